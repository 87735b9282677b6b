"""The arithmetic of activations against peaks measured on devices (docs/long_rows.md, benchmarks/NOTES.md)."""

from __future__ import annotations

import functools

import pytest
from transformers import AutoConfig

from tests.docs.pages import ROOT
from veomni.cli.memory import RowMemory
from veomni.errors import ConfigError
from veomni.metrics.activation_memory import ActivationPolicy
from veomni.models import build_model, derive_plan
from veomni.ops.experts.exchange import ranks_of_token
from veomni.run_config.train import TrainSection

GIB = 2**30
MEASURED = [  # compiled blocks, bf16, AdamW, FSDP2; GiB at the peak
    ("qwen3_1.7b", 28, 1, 1, 1, 16_384, ActivationPolicy(), 56.7),
    ("qwen3_1.7b", 28, 2, 1, 1, 16_384, ActivationPolicy(), 44.6),
    ("qwen3_1.7b", 28, 4, 1, 1, 16_384, ActivationPolicy(), 39.8),
    ("qwen3_1.7b", 28, 1, 1, 1, 16_384, ActivationPolicy("selective"), 37.4),
    ("qwen3_1.7b", 28, 1, 1, 1, 131_072, ActivationPolicy("full"), 50.4),
    ("qwen3_1.7b", 28, 2, 2, 1, 65_536, ActivationPolicy("full"), 25.4),
    ("qwen3_8b", 36, 4, 1, 1, 8_192, ActivationPolicy("full"), 36.4),
    ("qwen3_30b_a3b", 8, 4, 1, 1, 16_384, ActivationPolicy(), 31.8),
    ("qwen3_30b_a3b", 8, 4, 1, 4, 16_384, ActivationPolicy(), 33.3),
]


@functools.cache
def model_of(name, layers):
    config = AutoConfig.from_pretrained(ROOT / f"configs/model_configs/{name}.json")
    config.num_hidden_layers = layers
    return build_model(config, weights="random")


def memory_of(name, layers, gpus, ulysses=1, experts=1, micro_batches=1, **options):
    train = TrainSection(
        global_batch_size=gpus, output_dir="output", precision="bf16", ulysses_parallel_size=ulysses,
        expert_parallel_size=experts, **options,
    )  # fmt: skip
    return RowMemory(model_of(name, layers), train, gpus, micro_batches)


@pytest.mark.parametrize(("name", "layers", "gpus", "ulysses", "experts", "tokens", "policy", "measured"), MEASURED)
def test_a_peak_is_near_the_measured_one(name, layers, gpus, ulysses, experts, tokens, policy, measured):
    found = memory_of(name, layers, gpus, ulysses, experts).peak(tokens, policy) / GIB
    assert abs(found / measured - 1) < 0.1, found


def test_the_longest_row_is_the_last_that_fits():
    memory = memory_of("qwen3_1.7b", 28, 4)
    found = dict(memory.longest(76 * GIB))
    assert len(found) == 5
    assert list(found.values()) == sorted(found.values())
    for policy, tokens in found.items():
        assert memory.peak(tokens, policy) <= 76 * GIB < memory.peak(tokens + 1024, policy)


def test_gradients_of_earlier_micro_batches_come_on_top():
    once, often = (memory_of("qwen3_1.7b", 28, 4, micro_batches=count) for count in (1, 2))
    gradients = sum(each.numel() for each in model_of("qwen3_1.7b", 28).parameters()) * 4 / 4
    assert often.peak(65_536, ActivationPolicy("full")) - once.peak(65_536, ActivationPolicy("full")) == gradients


def test_a_fixed_exchange_keeps_every_token_and_row():
    exact, fixed = (
        memory_of("qwen3_30b_a3b", 8, 4, experts=4, expert_parallel={"exchange": exchange})
        for exchange in ("exact", "fixed")
    )
    kept, tokens = [], 1 << 20  # so many that what a block keeps decides
    for policy in (ActivationPolicy(), ActivationPolicy("full")):
        kept.append((fixed.peak(tokens, policy) - exact.peak(tokens, policy)) / tokens / 2)
    rows, width, hidden, received = 8, 768, 2048, 4 - ranks_of_token(128, 8, 4, fixed=False)
    backward = 3 * rows * (4 * width + hidden)
    assert kept[0] == pytest.approx(8 * (3 * rows * 2 * width + received * hidden) + backward)
    assert kept[1] == pytest.approx(3 * rows * 2 * width + received * hidden + backward)


def test_a_model_without_dense_mlps_has_no_tiles_and_another_model_is_not_counted():
    assert all(policy.tile is None for policy, _ in memory_of("qwen3_30b_a3b", 8, 4).longest(76 * GIB))
    plain = model_of("qwen3_1.7b", 28).model.layers[0].mlp
    with pytest.raises(ConfigError, match="are not counted"):
        RowMemory(plain, TrainSection(global_batch_size=1, output_dir="output"), 1)
    assert not derive_plan(plain).blocks
