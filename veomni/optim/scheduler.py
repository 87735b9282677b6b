"""Learning rate over time: a linear warm-up, then constant, linear, cosine, or constant with a decay at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from veomni.errors import ConfigError
from veomni.registry import did_you_mean

SHAPES = ("constant", "linear", "cosine", "wsd")
DECAYS = ("linear", "cosine", "sqrt")


def build_scheduler(
    optimizer: Optimizer,
    *,
    name: str,
    total_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    decay_ratio: float = 0.1,
    decay_shape: str = "linear",
) -> LRScheduler:
    """Return the schedule; call its ``step()`` after every ``optimizer.step()``.

    Its state is plain JSON: how many steps were done. The shape is not part of it, so that a run resumed with a larger
    ``total_steps`` follows the longer schedule; nor are the groups, so that it resumes in any layout. Peak rates are
    resumed with the optimizer's groups, like everything else in them.

    Args:
        optimizer: Its groups' ``lr`` are the peaks.
        name: "constant", "linear", "cosine" or "wsd".
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Steps below the peak at the start.
        min_lr_ratio: What all but constant end at, as a share of the peak.
        decay_ratio: wsd only: the share of all steps, at the end, in which the rate falls.
        decay_shape: wsd only: how it falls, "linear", "cosine" or "sqrt".

    Raises:
        ConfigError: there is no such shape, or warm-up and decay are longer than the run.
    """
    for key, value, known in (("name", name, SHAPES), ("decay_shape", decay_shape, DECAYS)):
        if value not in known:
            raise ConfigError(f"train.scheduler.{key}: there is no {value!r}", did_you_mean(value, list(known)))
    if not 0 <= warmup_steps <= total_steps:
        raise ConfigError(
            f"train.scheduler.warmup_steps is {warmup_steps} in a run of {total_steps} steps",
            f"use a number from 0 to {total_steps}",
        )
    if name == "wsd" and warmup_steps + decay_steps(total_steps, decay_ratio) > total_steps:
        raise ConfigError(
            f"{warmup_steps} steps of warm-up and train.scheduler.decay_ratio {decay_ratio} are more than the run's "
            f"{total_steps} steps",
            "warm up in fewer steps, or decay in a smaller share of them",
        )
    return _FactorLR(
        optimizer,
        partial(
            lr_factor,
            name=name,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            min_lr_ratio=min_lr_ratio,
            decay_ratio=decay_ratio,
            decay_shape=decay_shape,
        ),
    )


def lr_factor(
    step: int,
    *,
    name: str,
    total_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    decay_ratio: float = 0.1,
    decay_shape: str = "linear",
) -> float:
    """Return the learning rate of a step as a share of the peak.

    With ``w = warmup_steps``, ``T = total_steps``, ``m = min_lr_ratio``: ``(step + 1) / (w + 1)`` before step ``w``,
    then 1 (constant), or ``1 - (1 - m) f(p)`` with ``p = (step - s) / (T - s)``, ``p = 0`` before step ``s`` and
    ``p = 1`` from step ``T`` on: no step of the run has rate 0. The decay starts at ``s = w`` (linear, cosine), or, in
    the warmup-stable-decay schedule of MiniCPM (arXiv:2404.06395), :func:`decay_steps` before ``T`` (wsd). Its shape is
    ``f(p) = p`` (linear), ``(1 - cos(pi p)) / 2`` (cosine) or ``sqrt(p)`` (sqrt: arXiv:2405.18392).

    Args:
        step: Optimizer steps done before this one.
        name: "constant", "linear", "cosine" or "wsd".
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Steps below the peak at the start.
        min_lr_ratio: What all but constant end at.
        decay_ratio: wsd only: the share of all steps in which the rate falls.
        decay_shape: wsd only: "linear", "cosine" or "sqrt".
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if name == "constant":
        return 1.0
    length = decay_steps(total_steps, decay_ratio) if name == "wsd" else total_steps - warmup_steps
    done = step - (total_steps - length)
    progress = 1.0 if step >= total_steps else max(0, done) / length
    shape = decay_shape if name == "wsd" else name
    if shape == "cosine":
        return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - (1.0 - min_lr_ratio) * (math.sqrt(progress) if shape == "sqrt" else progress)


def decay_steps(total_steps: int, decay_ratio: float) -> int:
    """Return in how many of the last steps wsd decays: ``decay_ratio`` of them, rounded, and one at least."""
    return max(1, round(total_steps * decay_ratio))


class _FactorLR(LRScheduler):
    """Set every group's rate to its peak times a factor of the steps done.

    ``LambdaLR`` does that too, but keeps the peaks of all groups in its state, which then only fits as many groups.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self._factor = factor
        super().__init__(optimizer)

    @override
    def get_lr(self) -> list[float | Tensor]:
        factor = self._factor(self.last_epoch)
        return [group["initial_lr"] * factor for group in self.optimizer.param_groups]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after the steps that were done, with the optimizer's peak rates."""
        self.last_epoch = state_dict["last_epoch"]
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
