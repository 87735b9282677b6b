"""Items travel to the rank with least to do: the plan is good, and every gradient is that of one process."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tests.models.multimodal import FAMILIES, Sampler, family_config, worst
from tests.parity.layouts import beside
from tests.strategies import test_absent_media as absent
from tests.strategies.test_absent_media import ROW, STEPS, step_of, truth, weights_of, whole_gradients
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.launcher import Launcher
from veomni.models import build_model, freeze
from veomni.strategies import DDP, FSDP1, FSDP2, Ulysses
from veomni.strategies.transforms.encoder_balance import assign
from veomni.testing.ranks import run_ranks

HEAVY = [("image", (1, 8, 8)), ("text", 3), ("image", (1, 8, 8)), ("image", (1, 4, 4)), ("text", 2)]
STEPS = {**STEPS, "one rank has all": [[[HEAVY], [HEAVY]], [[absent.TEXT], [absent.TEXT]]]}
LAYOUTS = {
    "ddp": (2, lambda: DDP()),
    "fsdp1": (2, lambda: FSDP1()),
    "fsdp2": (2, lambda: FSDP2()),
    "ulysses": (4, lambda: [FSDP2(), Ulysses(2)]),
}


def one_step(name, layout, step, frozen, balance):
    strategies = beside(LAYOUTS[layout][1](), balance=balance)
    launcher = Launcher(strategies, accelerator="cpu", backend="gloo", precision="fp64", timeout_seconds=60)
    launcher.launch()
    model = build_model(weights_of(name))
    freeze(model, frozen)
    model = launcher.setup_model(model).train()
    encoded = []
    for module in model.modules():
        if type(module).__name__.endswith("PatchEmbed"):
            module.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    sampler = Sampler(name)
    documents = [[[sampler(parts) for parts in row] for row in rank] for rank in step]
    collate = MultimodalCollator(family_config(name), max_seq_len=ROW, shard=launcher.sequence_shard)
    micro_batches = [collate([row]) for row in documents[launcher.data_parallel.rank]]
    for batch in launcher.track([micro_batches]):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        found = launcher.global_loss(batch).item(), whole_gradients(model), encoded
    launcher.close()
    return found


def check(name, layout, step, frozen=(), balance=True):
    loss, expected = truth(name, STEPS[step], frozen)
    results = run_ranks(one_step, LAYOUTS[layout][0], name, layout, STEPS[step], frozen, balance, init=False)
    for found_loss, found, _ in results:
        assert found_loss == pytest.approx(loss, rel=1e-12)
        assert all(not found[key].any() for key in found.keys() - expected.keys())
        assert worst({key: found[key] for key in expected}, expected) <= 1e-12
    return [sum(encoded) for _, _, encoded in results]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", ["one rank has all", "images here, videos there"])
def test_gradients_are_those_of_one_process(layout, step):
    check("qwen3_vl", layout, step)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    check(name, "fsdp2", step_of(name))


def test_sounds_of_shared_rows():
    check("qwen2_5_omni_thinker", "ulysses", step_of("qwen2_5_omni_thinker"))


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_frozen_tower(layout):
    check("qwen3_vl", layout, "one rank has all", ("model.visual",))


def test_no_rank_has_an_image():
    check("qwen3_vl", "fsdp2", "no rank has any")


def test_the_work_is_spread():
    """288 patches of images on one rank, none on the other: each encodes half, and small dummies beside."""
    alone = check("qwen3_vl", "ddp", "one rank has all", balance=False)
    spread = check("qwen3_vl", "ddp", "one rank has all")
    assert alone[0] >= 288 > 40 > alone[1]
    assert max(spread) <= 0.65 * alone[0]
    assert min(spread) >= 0.4 * alone[0]


def test_plans_are_within_a_third_of_the_best():
    generator = random.Random(0)
    for _ in range(60):
        costs = [[generator.randint(1, 30) for _ in range(generator.randint(0, 3))] for _ in range(3)]
        items = list(itertools.chain(*costs))
        places = list(itertools.chain(*assign(costs)))
        worst_load = max(sum(c for c, p in zip(items, places, strict=True) if p == rank) for rank in range(3))
        best = min(
            max(sum(c for c, p in zip(items, other, strict=True) if p == rank) for rank in range(3))
            for other in itertools.product(range(3), repeat=len(items))
        )  # fmt: skip
        assert worst_load <= best * 4 / 3 or not items


def test_an_even_load_stays_at_home():
    assert assign([[9, 1], [9, 1], [9, 1]]) == [[0, 0], [1, 1], [2, 2]]


def test_plans_do_not_depend_on_who_asks():
    costs = [[5, 5, 5, 5], [], [1]]
    assert assign(costs) == assign([list(own) for own in costs])
    assert torch.tensor(sum(len(own) for own in assign(costs))) == 5
