"""Learning rate over time: a linear warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from veomni.errors import ConfigError
from veomni.registry import did_you_mean

SHAPES = ("constant", "linear", "cosine")


def build_scheduler(
    optimizer: Optimizer, *, name: str, total_steps: int, warmup_steps: int, min_lr_ratio: float
) -> LambdaLR:
    """Return the schedule; call its ``step()`` after every ``optimizer.step()``.

    Its state is plain JSON: how many steps were done, and the groups' peak rates. The shape is not part of it, so that
    a run resumed with a larger ``total_steps`` follows the longer schedule. Peak rates are resumed, like everything
    else in the optimizer's groups.

    Args:
        optimizer: Its groups' ``lr`` are the peaks.
        name: "constant", "linear" or "cosine".
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Steps below the peak at the start.
        min_lr_ratio: What linear and cosine end at, as a share of the peak.

    Raises:
        ConfigError: there is no such shape, or the warm-up is longer than the run.
    """
    if name not in SHAPES:
        raise ConfigError(f"train.scheduler.name: no schedule is called {name!r}", did_you_mean(name, list(SHAPES)))
    if not 0 <= warmup_steps <= total_steps:
        raise ConfigError(
            f"train.scheduler.warmup_steps is {warmup_steps} in a run of {total_steps} steps",
            f"use a number from 0 to {total_steps}",
        )
    # LambdaLR saves and restores a callable's __dict__: that of a partial is empty, and the shape stays the config's.
    factor = partial(
        lr_factor, name=name, total_steps=total_steps, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio
    )
    return LambdaLR(optimizer, factor)


def lr_factor(step: int, *, name: str, total_steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Return the learning rate of a step as a share of the peak.

    With ``w = warmup_steps``, ``T = total_steps``, ``m = min_lr_ratio``: ``(step + 1) / (w + 1)`` before step ``w``,
    then, with ``p = (step - w) / (T - w)``, ``1`` (constant), ``1 - (1 - m) p`` (linear) or
    ``m + (1 - m) (1 + cos(pi p)) / 2`` (cosine), with ``p = 1`` from step ``T`` on: no step of the run has rate 0.

    Args:
        step: Optimizer steps done before this one.
        name: "constant", "linear" or "cosine".
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Steps below the peak at the start.
        min_lr_ratio: What linear and cosine end at.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if name == "constant":
        return 1.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps) if step < total_steps else 1.0
    if name == "linear":
        return 1.0 - (1.0 - min_lr_ratio) * progress
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
