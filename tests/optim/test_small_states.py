"""AdamW with moments of 8 bits, and of bfloat16: beside AdamW with float32 ones, and from one layout to another."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from veomni.checkpoint import Checkpointer
from veomni.errors import MissingExtraError, ModelError
from veomni.optim import build_optimizer, build_scheduler
from veomni.testing.ranks import run_ranks

NAMES = ("adamw_8bit", "adamw_bf16")
OPTIONS = {"lr": 3e-3, "weight_decay": 0.1, "no_decay": (), "lr_scale": {"0.*": 0.5}}


@pytest.fixture(autouse=True)
def _torchao():
    pytest.importorskip("torchao")
    torch.compiler.set_stance("force_eager")  # its kernels take seconds each to compile
    yield
    torch.compiler.set_stance("default")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 256))


def laid_out(layout: str) -> nn.Module:
    return {"single": lambda each: each, "ddp": DistributedDataParallel, "fsdp2": fully_shard}[layout](network())


def start(layout: str, name: str) -> dict:
    model = laid_out(layout)
    optimizer = build_optimizer(model, name, **OPTIONS)
    return {"model": model, "optimizer": optimizer, "scheduler": build_scheduler(optimizer, total_steps=80)}


def steps(state: dict, indices) -> float:
    """Learn a fixed map of rank 4 from rows that all ranks have; return the last loss."""
    first, second = torch.randn(2, 256, 4, generator=torch.Generator().manual_seed(9)) / 8
    target = first @ second.T
    loss = torch.zeros(())
    for index in indices:
        rows = torch.randn(32, 256, generator=torch.Generator().manual_seed(index))
        loss = (state["model"](rows) - rows @ target).square().mean()
        loss.backward()
        rates = state["scheduler"].get_last_lr()
        rate = float(rates[0])
        state["optimizer"].step()
        state["scheduler"].step()
        assert float(rates[0]) == rate  # what a loop logs after the step
        state["optimizer"].zero_grad()
    return loss.item()


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_what_float32_moments_learn(name):
    found, truth = start("single", name), start("single", "adamw")
    begun, losses = steps(start("single", name), [0]), [steps(state, range(80)) for state in (found, truth)]
    assert losses[1] < 0.6 * begun
    assert losses[0] == pytest.approx(losses[1], rel=0.005)
    origin, pairs = network(), zip(found["model"].parameters(), truth["model"].parameters(), strict=True)
    for start_, (own, other) in zip(origin.parameters(), pairs, strict=True):
        assert (own - other).norm() < 0.03 * (other - start_).norm()  # of the way that it went


def test_matrices_have_a_quarter_of_the_state():
    state = start("single", "adamw_8bit")
    steps(state, range(1))
    kept = [state["optimizer"].state[parameter] for parameter in state["model"].parameters() if parameter.ndim == 2]
    for moments in kept:
        for name in ("exp_avg", "exp_avg_sq"):
            moment = moments[name]
            assert moment.codes.element_size() == 1
            assert moment.codes.nbytes + moment.scale.nbytes < 0.26 * 4 * moment.numel()


def save(directory: Path, layout: str, name: str, *, async_save: bool) -> None:
    state = start(layout, name)
    steps(state, range(2))
    checkpointer = Checkpointer(directory, async_save=async_save)
    checkpointer.save(state, 2)
    steps(state, range(2, 3))  # the copies are written meanwhile
    checkpointer.close()


def finish(directory: Path, layout: str, name: str) -> list[torch.Tensor]:
    state = start(layout, name)
    checkpointer = Checkpointer(directory)
    assert checkpointer.load_latest(state) == 2
    checkpointer.close()
    steps(state, range(2, 4))
    return values(state["model"])


def values(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("saved", "loaded"), [("single", "single"), ("fsdp2", "fsdp2"), ("fsdp2", "single"), ("ddp", "fsdp2")]
)
def test_a_run_that_was_resumed_ends_as_an_unbroken_one(tmp_path, saved, loaded, name):
    """On other ranks too: the blocks of a matrix with a multiple of 256 columns or values are whole on each."""
    state = start("single", name)
    steps(state, range(4))
    run_ranks(save, 1 if saved == "single" else 2, tmp_path, saved, name, async_save=saved != loaded)
    for found in run_ranks(finish, 1 if loaded == "single" else 2, tmp_path, loaded, name):
        for own, other in zip(found, values(state["model"]), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=0)


def flat(name: str) -> None:
    build_optimizer(FullyShardedDataParallel(network(), device_id=torch.device("cpu")), name)


@pytest.mark.parametrize(("name", "problem"), [("adamw_8bit", "FSDP1 cuts"), ("adamw_bf16", "FSDP1's flat shards")])
def test_flat_parameters_are_an_input_error(name, problem):
    with pytest.raises(Exception, match=problem) as caught:
        run_ranks(flat, 1, name)
    assert isinstance(caught.value.exceptions[0], ModelError)


def test_a_missing_package_and_other_formats_are_input_errors(monkeypatch):
    with pytest.raises(ModelError, match=r"parameters of torch.bfloat16, torch.float64"):
        build_optimizer(nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2).bfloat16()), "adamw_bf16")
    with pytest.raises(ModelError, match="no sparse gradients, which 0 makes"):
        build_optimizer(nn.Sequential(nn.Embedding(4, 4, sparse=True)), "adamw_bf16")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingExtraError, match=r"veomni\[torchao\]"):
        build_optimizer(network(), "adamw_8bit", **OPTIONS)
