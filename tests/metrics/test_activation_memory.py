"""The arithmetic of activations against peaks that were measured on devices (docs, benchmarks/NOTES.md)."""

from __future__ import annotations

import functools

import pytest
from transformers import AutoConfig

from tests.docs.pages import ROOT
from veomni.cli.memory import RowMemory
from veomni.errors import ConfigError
from veomni.metrics.activation_memory import Rung
from veomni.models import build_model, derive_plan
from veomni.run_config.train import TrainSection

GIB = 2**30
MEASURED = [  # compiled blocks, bf16, AdamW, FSDP2; GiB at the peak
    ("qwen3_1.7b", 28, 1, 1, 16_384, Rung(), 56.7),
    ("qwen3_1.7b", 28, 2, 1, 16_384, Rung(), 44.6),
    ("qwen3_1.7b", 28, 4, 1, 16_384, Rung(), 39.8),
    ("qwen3_1.7b", 28, 1, 1, 16_384, Rung("selective"), 37.4),
    ("qwen3_1.7b", 28, 1, 1, 131_072, Rung("full"), 50.4),
    ("qwen3_1.7b", 28, 2, 2, 65_536, Rung("full"), 25.4),
    ("qwen3_8b", 36, 4, 1, 8_192, Rung("full"), 36.4),
    ("qwen3_30b_a3b", 8, 4, 1, 16_384, Rung(), 31.8),
]


@functools.cache
def model_of(name, layers):
    config = AutoConfig.from_pretrained(ROOT / f"configs/model_configs/{name}.json")
    config.num_hidden_layers = layers
    return build_model(config, weights="random")


def memory_of(name, layers, gpus, shared=1, micro_batches=1):
    train = TrainSection(global_batch_size=gpus, output_dir="output", precision="bf16", ulysses_parallel_size=shared)
    return RowMemory(model_of(name, layers), train, gpus, micro_batches)


@pytest.mark.parametrize(("name", "layers", "gpus", "shared", "tokens", "rung", "measured"), MEASURED)
def test_a_peak_is_within_ten_per_cent_of_what_was_measured(name, layers, gpus, shared, tokens, rung, measured):
    found = memory_of(name, layers, gpus, shared).peak(tokens, rung) / GIB
    assert abs(found / measured - 1) < 0.1, found


def test_the_longest_row_is_the_last_that_fits():
    memory = memory_of("qwen3_1.7b", 28, 4)
    found = dict(memory.longest(76 * GIB))
    assert len(found) == 5
    assert list(found.values()) == sorted(found.values())
    for rung, tokens in found.items():
        assert memory.peak(tokens, rung) <= 76 * GIB < memory.peak(tokens + 1024, rung)


def test_gradients_of_earlier_micro_batches_come_on_top():
    once, often = (memory_of("qwen3_1.7b", 28, 4, micro_batches=count) for count in (1, 2))
    gradients = sum(each.numel() for each in model_of("qwen3_1.7b", 28).parameters()) * 4 / 4
    assert often.peak(65_536, Rung("full")) - once.peak(65_536, Rung("full")) == gradients


def test_a_model_without_dense_mlps_has_no_tiles_and_another_model_is_not_counted():
    assert all(rung.tile is None for rung, _ in memory_of("qwen3_30b_a3b", 8, 4).longest(76 * GIB))
    plain = model_of("qwen3_1.7b", 28).model.layers[0].mlp
    with pytest.raises(ConfigError, match="are not counted"):
        RowMemory(plain, TrainSection(global_batch_size=1, output_dir="output"), 1)
    assert not derive_plan(plain).blocks
