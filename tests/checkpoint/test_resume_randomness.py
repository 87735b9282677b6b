"""A run that draws from every generator, stopped and resumed: it goes on with the very numbers it would have drawn."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from veomni.launcher import Launcher
from veomni.loop.checkpoint_schedule import CheckpointSchedule
from veomni.strategies import FSDP2, Single
from veomni.testing.ranks import run_ranks


class Noisy(nn.Module):
    """A regression with dropout, whose inputs are shifted by Python's and NumPy's generators."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.Linear(32, 1))

    def forward(self, x):
        shift = random.gauss(0, 1) + np.random.standard_normal()  # both keep half of a pair for the next call
        return (self.layers(x + shift) - x.sum(1, keepdim=True)).square().mean()


class Rows:
    """The rows of each step, and how many steps were taken."""

    def __init__(self, rank: int) -> None:
        self.rank, self.step = rank, 0

    def __iter__(self):
        while True:
            self.step += 1
            generator = torch.Generator().manual_seed(100 * self.rank + self.step)
            yield [{"x": torch.randn(4, 8, generator=generator)}]

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def train(directory: Path, last_step: int, *, async_save: bool = False, without_rng: bool = False) -> dict[int, float]:
    """Train to ``last_step`` from wherever ``directory`` stands; returns this rank's own loss of each step."""
    strategy = Single() if int(os.environ["WORLD_SIZE"]) == 1 else FSDP2()
    schedule = CheckpointSchedule(directory, save_steps=3, async_save=async_save)
    launcher = Launcher(strategy, accelerator="cpu", timeout_seconds=60, checkpoints=schedule)
    launcher.launch()
    model = launcher.setup_model(Noisy())
    optimizer = launcher.setup_optimizer(model, torch.optim.AdamW, lr=1e-2)
    state = {"model": model, "optimizer": optimizer, "loader": Rows(launcher.rank)}
    drawn = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    launcher.resume(state)
    if without_rng:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        torch.set_rng_state(drawn[2])
    losses = {}
    for batch in launcher.track(state["loader"], max_steps=last_step):
        for micro in launcher.accumulate(model, batch):
            loss = model(micro.inputs["x"])
            losses[batch.index] = loss.item()
            launcher.backward(loss, micro)
        optimizer.step()
        optimizer.zero_grad()
        launcher.checkpoint(state)
    launcher.close()
    return losses


@pytest.mark.parametrize(("ranks", "async_save"), [(1, False), (2, False), (2, True)])
def test_a_resumed_run_draws_what_the_unbroken_one_drew(tmp_path, ranks, async_save):
    unbroken = run_ranks(train, ranks, tmp_path / "unbroken", 6, init=False)
    first = run_ranks(train, ranks, tmp_path / "stopped", 3, async_save=async_save, init=False)
    second = run_ranks(train, ranks, tmp_path / "stopped", 6, async_save=async_save, init=False)
    for rank in range(ranks):
        assert list(second[rank]) == [4, 5, 6]
        assert first[rank] | second[rank] == unbroken[rank]
    assert len({loss for losses in unbroken for loss in losses.values()}) == 6 * ranks  # no two ranks draw alike


def test_without_its_generators_it_would_not(tmp_path):
    unbroken = run_ranks(train, 1, tmp_path / "unbroken", 6, init=False)[0]
    run_ranks(train, 1, tmp_path / "stopped", 3, init=False)
    resumed = run_ranks(train, 1, tmp_path / "stopped", 6, without_rng=True, init=False)[0]
    assert all(resumed[step] != unbroken[step] for step in (4, 5, 6))
