"""A hundred steps on GPUs: the bytes allocated before a step do not grow, with Python's collector off."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.gpu.devices import KIND, LAUNCHER, RANKS, on_devices, outcome_of
from tests.models.tiny import tiny_config
from tests.parity.layouts import EXPERT_LAYOUTS, LAYOUTS, vocabulary
from tests.strategies.test_live_tensors import EXPERTS, TEXT, collector_off
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.testing.documents import global_rows, share

STEPS = 100
NAMES = [
    (ranks, "qwen3" if kind is TEXT else "qwen3_moe", layout)
    for kind in (TEXT, EXPERTS)
    for ranks, layouts in kind.items()
    for layout in layouts
    if ranks in RANKS
]


def allocated() -> int:
    return torch.get_device_module(KIND).memory_allocated() if KIND != "cpu" else 0


def before_each_step(layout: str, model_type: str, kept: list[Any] | None = None) -> list[int]:
    """The bytes of this rank; ``kept`` keeps a tensor of each step."""
    launcher = Launcher((LAYOUTS | EXPERT_LAYOUTS)[layout][1](), **LAUNCHER, precision="bf16")
    launcher.launch()
    model = launcher.setup_model(build_model(tiny_config(model_type), weights="random")).train()
    optimizer = launcher.setup_optimizer(model, torch.optim.AdamW, lr=1e-3)
    place, found = launcher.data_parallel, []
    rows = share(global_rows(vocabulary(model_type)), place.rank, place.size, 2)
    with collector_off():
        for batch in launcher.track([rows] * STEPS, gc_steps=None):
            launcher.accelerator.synchronize()
            found.append(allocated())
            for micro in launcher.accumulate(model, batch):
                launcher.backward(model(**micro.inputs).loss, micro)
            launcher.clip_grad_norm(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if kept is not None:
                kept.append(launcher.global_loss(batch))
    launcher.close()
    return found


def growth(found: list[int]) -> int:
    """Bytes that the second half needs more than the first, whose first steps make optimizer state and buffers."""
    return max(found[STEPS // 2 :]) - max(found[5 : STEPS // 2])


@pytest.fixture(scope="module")
def memory():
    found = {}
    for ranks in RANKS:
        same = [name for name in NAMES if name[0] == ranks]
        jobs = [partial(before_each_step, layout, model) for _, model, layout in same]
        found |= zip(same, on_devices(jobs, ranks), strict=True)
    return found


@pytest.mark.parametrize("name", NAMES, ids=lambda name: "-".join(map(str, name)))
def test_it_does_not_grow(name, memory):
    for found in outcome_of(memory[name]):
        assert len(found) == STEPS
        assert growth(found) <= 0, found


@pytest.mark.skipif(KIND == "cpu", reason="no bytes are counted on the CPU")
def test_a_tensor_that_each_step_leaves_is_found():
    (found,) = on_devices([partial(before_each_step, "single", "qwen3", [])], 1)
    assert growth(outcome_of(found)[0]) >= 512 * STEPS // 4  # an allocation takes 512 bytes
