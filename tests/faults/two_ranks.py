"""A small sharded state whose every value follows from its step, and hooks on what a save does to the disk."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from veomni.checkpoint import Checkpointer
from veomni.checkpoint.objects import read_objects
from veomni.testing.ranks import run_ranks


class Own:
    """A state that every rank has its own of."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": torch.tensor(self.value)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.value = int(state["value"])


def weight(step: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))


def state_at(step: int) -> dict[str, object]:
    """A model sharded over all ranks and an object of this rank, both as they are at ``step``."""
    model = nn.Linear(4, 6, bias=False)
    with torch.no_grad():
        model.weight.copy_(weight(step))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return {"model": model, "rng": Own(10 * step + dist.get_rank())}


def save_steps(directory: Path, steps: tuple[int, ...], async_save: bool = False) -> None:
    checkpointer = Checkpointer(directory, async_save=async_save)
    for step in steps:
        checkpointer.save(state_at(step), step)
    checkpointer.close()


def load_and_compare(directory: Path) -> int:
    """Load the newest checkpoint on all ranks, compare every value of this rank, and return the step."""
    state, checkpointer = state_at(99), Checkpointer(directory)
    step = checkpointer.load_latest(state)
    checkpointer.close()
    assert step is not None
    assert torch.equal(state["model"].weight.full_tensor(), weight(step))
    assert state["rng"].value == 10 * step + dist.get_rank()
    return step


def whole_step(directory: Path) -> int:
    """Load all that is published into this one process, compare every value in it; returns what ``auto`` takes."""
    model, checkpointer = nn.Linear(4, 6, bias=False), Checkpointer(directory)
    newest = checkpointer.load_latest({"model": model})
    for name in names(directory):
        step = checkpointer.load({"model": model}, directory / name)
        assert torch.equal(model.weight, weight(step))
        for rank in range(2):
            assert read_objects(directory / name / f"rank_{rank}")["rng"]["value"] == 10 * step + rank
    checkpointer.close()
    assert newest is not None
    assert names(directory)[-1] == f"global_step_{newest}"
    return newest


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def before_each_operation(call: Callable[[str], None]) -> None:
    """Call ``call`` before every fsync, rename and deletion of a directory in this process, from now on."""
    fsync = os.fsync

    def announced(descriptor: int) -> None:
        call("fsync")
        fsync(descriptor)

    os.fsync = announced
    sys.addaudithook(lambda event, _: call(event) if event in ("os.rename", "os.rmdir") else None)


@pytest.fixture(scope="session")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoints of steps 1 and 2 of two ranks; not to be changed."""
    directory = tmp_path_factory.mktemp("two_saved")
    run_ranks(save_steps, 2, directory, (1, 2))
    return directory


def copy_of(saved: Path, target: Path) -> Path:
    shutil.copytree(saved, target)
    return target
