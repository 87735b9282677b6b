"""Two models with other sequence groups in one process, their forwards and backwards interleaved: both are exact."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import nn

from tests.models.tiny import tiny_config
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.strategies import DDP, FSDP2, ActivationCheckpointing, Compile, ContextParallel, Ulysses
from veomni.testing.documents import global_rows, share
from veomni.testing.oracle import BOUNDS, Truth, check, truth_of
from veomni.testing.ranks import run_ranks
from veomni.testing.step import full_gradients

PAIRS: dict[str, tuple[int, Callable[[], Any], Callable[[], Any]]] = {
    "ulysses4_and_ulysses2": (4, lambda: [FSDP2(), Ulysses(4)], lambda: [FSDP2(), Ulysses(2)]),
    "ring4_and_ring2": (4, lambda: [FSDP2(), ContextParallel(4)], lambda: [FSDP2(), ContextParallel(2)]),
    "ulysses2_and_whole_rows": (2, lambda: [FSDP2(), Ulysses(2)], lambda: [DDP()]),
}


BLOCKS: dict[str, tuple[str, list[Any]]] = {
    "plain": ("fp64", []),
    "recomputed": ("fp64", [ActivationCheckpointing()]),
    "compiled": ("fp32", [Compile("eager")]),  # a graph of another model's groups would be found by Dynamo's guards
}


def set_up(strategies: list[Any], precision: str) -> tuple[Launcher, nn.Module]:
    launcher = Launcher(strategies, accelerator="cpu", backend="gloo", precision=precision, timeout_seconds=60)
    launcher.launch()
    return launcher, launcher.setup_model(build_model(tiny_config("qwen3"), weights="random")).train()


def interleaved(first: Callable[[], Any], second: Callable[[], Any], blocks: str) -> list[Truth]:
    precision, more = BLOCKS[blocks]
    pairs = [set_up([*strategies(), *more], precision) for strategies in (first, second)]
    rows = global_rows(tiny_config("qwen3").vocab_size)
    steps, micros = [], []
    for launcher, model in pairs:
        place = launcher.data_parallel
        steps.append(next(launcher.track([share(rows, place.rank, place.size, 2)])))
        micros.append(launcher.accumulate(model, steps[-1]))
    for both in zip(*micros, strict=True):
        losses = [model(**micro.inputs).loss for (_, model), micro in zip(pairs, both, strict=True)]
        for (launcher, _), loss, micro in zip(pairs, losses, both, strict=True):
            launcher.backward(loss, micro)
    found = []
    for (launcher, model), step in zip(pairs, steps, strict=True):
        gradients = full_gradients(model)
        norm = launcher.clip_grad_norm(model, 1e9).item()
        found.append(Truth(launcher.global_loss(step).item(), norm, gradients))
    return found


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("pair", PAIRS)
def test_each_model_uses_its_own_groups(pair: str, blocks: str) -> None:
    ranks, first, second = PAIRS[pair]
    truth = truth_of(tiny_config("qwen3"))
    for found in run_ranks(partial(interleaved, first, second, blocks), ranks, init=False):
        for outcome in found:
            check(outcome, truth, BOUNDS[BLOCKS[blocks][0]])
