"""Parameters on several meshes, one optimizer for each: what one layout saves, any other loads, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.optim.layouts import LAYOUTS, fsdp1_with_experts, give_gradients, laid_out, new_model, values, whole
from tests.together import Job, Together
from veomni.checkpoint import Checkpointer
from veomni.checkpoint.sharded_state import sharded_state
from veomni.optim import MultiOptimizer, build_optimizer, build_scheduler
from veomni.testing.ranks import run_ranks

FSDP1 = {"fsdp1_1": 1, "fsdp1_2": 2, "fsdp1_4": 4}
RANKS = {**LAYOUTS, **FSDP1}
ADAM = {"betas": (0.8, 0.9)}
OWN: dict[str, dict[str, object]] = {"adamw": ADAM, "sgd": {}, "muon": ADAM}


def start(layout: str, name: str, lr: float):
    if layout in FSDP1:
        mesh = init_device_mesh("cpu", (FSDP1[layout],), mesh_dim_names=("fsdp",))
        model: nn.Module = fsdp1_with_experts(new_model(), mesh)
    else:
        model = laid_out(layout)
    optimizer = build_optimizer(model, name=name, lr=lr, no_decay=(), **OWN[name])
    scheduler = build_scheduler(optimizer, name="wsd", total_steps=9, warmup_steps=3, min_lr_ratio=0.0)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def steps(state, indices) -> None:
    model = state["model"]
    for step in indices:
        if isinstance(model, FullyShardedDataParallel):  # its flat gradients can only come from a backward
            model(torch.arange(10)).square().mean().backward()
        else:
            give_gradients(model, step)
        state["optimizer"].step()
        state["scheduler"].step()
        state["optimizer"].zero_grad()


def everything(state) -> dict[str, object]:
    """All that a checkpoint holds of model and optimizer, unsharded; not which kernels were used."""
    table = sharded_state(state["model"], state["optimizer"])
    return {
        name: whole(value).clone() if isinstance(value, torch.Tensor) else value
        for name, value in table.items()
        if not name.endswith((".fused", ".foreach"))
    }


def save(directory: Path, layout: str, name: str) -> dict[str, object]:
    state = start(layout, name, 0.1)
    steps(state, range(2))
    checkpointer = Checkpointer(directory)
    checkpointer.save(state, 2)
    checkpointer.close()
    return everything(state)


def load(directory: Path, layout: str, name: str, more: bool):
    state = start(layout, name, 7.0)
    with torch.no_grad():
        for parameter in state["model"].parameters():
            parameter.zero_()
    checkpointer = Checkpointer(directory)
    assert checkpointer.load_latest(state) == 2
    checkpointer.close()
    found = everything(state)
    several = isinstance(state["optimizer"], MultiOptimizer)
    if more:
        steps(state, (2, 3))
    return found, several, values(state["model"]) if more else {}


def assert_same(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, name


def unbroken(name: str) -> dict[str, torch.Tensor]:
    state = start("single", name, 0.1)
    steps(state, range(4))
    return values(state["model"])


EXPERTS = [
    ("adamw", "ep4", "single"),
    ("adamw", "single", "ep2_fsdp2"),
    ("adamw", "hsdp_ep2", "ep2_fsdp2_columns"),
    ("muon", "ep2_fsdp2", "fsdp2_2"),
    ("muon", "fsdp2_4", "ep4"),
    ("muon", "ddp", "fsdp2_2"),
    ("sgd", "ep2", "single"),
    ("sgd", "single", "ep2"),
]
AROUND = [
    ("fsdp1_2", "single"),
    ("fsdp1_4", "fsdp1_2"),
    ("fsdp1_2", "fsdp1_4"),
    ("single", "fsdp1_2"),
    ("ep2_fsdp2", "fsdp1_4"),
    ("fsdp1_2", "ep2_fsdp2"),
]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Return what a layout saves with an optimizer, and what another loads of it: each once, on shared ranks."""
    folder = tmp_path_factory.mktemp("meshes")
    saves, loads = {}, {}
    for pair in [*EXPERTS, *(("adamw", source, target) for source, target in AROUND)]:
        name, source, target = pair
        place = folder / f"{name}-{source}"
        saves[name, source] = Job(RANKS[source], save, (place, source, name))
        loads[pair] = Job(RANKS[target], load, (place, target, name, pair in EXPERTS))
    saving, loading = Together(list(saves.values()), init=True), Together(list(loads.values()), init=True)
    saved = {key: saving(job)[0] for key, job in saves.items()}
    return lambda name, source, target: (saved[name, source], loading(loads[name, source, target]))


@pytest.mark.parametrize(("name", "source", "target"), EXPERTS)
def test_experts_change_their_mesh(jobs, name, source, target):
    saved, loaded = jobs(name, source, target)
    truth = unbroken(name)
    for found, several, trained in loaded:
        assert several is (name == "muon" or "ep" in target)
        assert_same(found, saved)
        for key, expected in truth.items():
            assert (trained[key] - expected).norm() <= 1e-12 * expected.norm(), key


@pytest.mark.parametrize(("source", "target"), AROUND)
def test_fsdp1_around_experts_that_fsdp2_shards(jobs, source, target):
    saved, loaded = jobs("adamw", source, target)
    for found, several, _ in loaded:
        assert several is (target != "single")
        assert_same(found, saved)


def kernels(directory: Path) -> list[object]:
    state = start("fsdp2_2", "sgd", 0.1)
    Checkpointer(directory).load_latest(state)
    steps(state, [2])
    return [group["fused"] for group in state["optimizer"].param_groups]


def test_a_run_keeps_the_kernels_that_it_can_use(tmp_path):
    """PyTorch's fused SGD takes plain tensors only; the run that saved used it."""
    run_ranks(save, 1, tmp_path, "single", "sgd")
    assert run_ranks(kernels, 2, tmp_path) == [[None, None]] * 2
