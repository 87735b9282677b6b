"""Learning rate over time: a linear warm-up, then constant, linear, cosine, or constant with a decay at the end."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict, Field
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from veomni.config.problems import Problem
from veomni.config.section import ComponentSection, checked, section_of
from veomni.errors import ConfigError
from veomni.registry import Registry

Share = Annotated[float, Ge(0.0), Le(1.0)]

SCHEDULERS: Registry[type[Shape]] = Registry("scheduler", group="veomni.schedulers", home="veomni.optim")
"""Name to the class of a :class:`Shape`."""


class Shape(ABC):
    """What the learning rate is after the warm-up."""

    def steps_needed(self, total_steps: int) -> int:
        """Return how many steps of the run must come after the warm-up."""
        return 0

    @abstractmethod
    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """Return the rate of a step, counted from 0 and not before ``warmup_steps``, as a share of the peak.

        No step of the run should have rate 0; from ``total_steps`` on the rate stays what it ends at.
        """


class SchedulerSection(ComponentSection):
    """Warm-up, then decay from ``optimizer.lr``."""

    configures = ("build_scheduler",)

    model_config = ConfigDict(use_attribute_docstrings=True)

    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear warm-up; null follows warmup_ratio."""
    warmup_ratio: Share | None = None
    """Warm-up as a share of all steps; null with warmup_steps null is no warm-up."""

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Return the schedule over a run of ``total_steps``; see :func:`build_scheduler`."""
        own = {key: value for key, value in self.arguments().items() if key not in SchedulerSection.model_fields}
        shape: Shape = type(self).component(**own)
        warmup = int(total_steps * (self.warmup_ratio or 0.0)) if self.warmup_steps is None else self.warmup_steps
        if warmup > total_steps:
            problem = f"warmup_steps is {warmup} in a run of {total_steps} steps"
            raise ConfigError(problem, f"use a number from 0 to {total_steps}", field="build_scheduler.warmup_steps")
        needed = shape.steps_needed(total_steps)
        if warmup + needed > total_steps:
            problem = f"{warmup} steps of warm-up and {needed} of decay are more than the run's {total_steps} steps"
            raise ConfigError(problem, "warm up in fewer steps, or decay in a smaller share of them")

        def factor(step: int) -> float:
            return (step + 1) / (warmup + 1) if step < warmup else shape.factor(step, total_steps, warmup)

        return _FactorLR(optimizer, factor)

    @override
    def problems(self, config: Any, world: int | None) -> Iterator[Problem]:
        yield from super().problems(config, world)
        steps, warmup = config.train.max_steps, self.warmup_steps
        if warmup is not None and self.warmup_ratio is not None:
            yield Problem("train.scheduler.warmup_steps and warmup_ratio are both set", "set one of them to null")
        elif warmup and steps is not None and warmup > steps:
            yield Problem(
                f"train.scheduler.warmup_steps {warmup} is more than train.max_steps {steps}",
                "warm up in fewer steps, or use train.scheduler.warmup_ratio",
            )
        else:
            share = (warmup or 0) / (steps or math.inf) if self.warmup_ratio is None else self.warmup_ratio
            decay = getattr(self, "decay_ratio", 0.0)
            if share + decay > 1:
                problem = f"the warm-up and train.scheduler.decay_ratio {decay} are more than the whole run"
                yield Problem(problem, "warm up in fewer steps, or decay in a smaller share of them")


def build_scheduler(
    optimizer: Optimizer, name: str = "cosine", *, total_steps: int, warmup_steps: int | None = None,
    warmup_ratio: float | None = None, **options: Any,
) -> LRScheduler:  # fmt: skip
    """Return the schedule; call its ``step()`` after every ``optimizer.step()``.

    Its state is plain JSON: how many steps were done. The shape is not part of it, so that a run resumed with a larger
    ``total_steps`` follows the longer schedule; nor are the groups, so that it resumes in any layout. Peak rates are
    resumed with the optimizer's groups, like everything else in them.

    With ``w`` warm-up steps the rate is ``(step + 1) / (w + 1)`` of the peak before step ``w``.

    Args:
        optimizer: Its groups' ``lr`` are the peaks.
        name: A registered scheduler: "constant", "linear", "cosine" or "wsd".
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Steps below the peak at the start; None follows ``warmup_ratio``.
        warmup_ratio: The same as a share of ``total_steps``; None is no warm-up.
        options: The scheduler's own, such as ``min_lr_ratio``.

    Raises:
        ConfigError: there is no such scheduler or option, or warm-up and decay are longer than the run.
    """
    section = section_of(SCHEDULERS.get(name), base=SchedulerSection)
    warmup = {"warmup_steps": warmup_steps, "warmup_ratio": warmup_ratio}
    return checked(section, warmup | options).build(optimizer, total_steps)


@SCHEDULERS.register("constant")
class Constant(Shape):
    """The peak."""

    @override
    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        return 1.0


@SCHEDULERS.register("linear")
class Linear(Shape):
    """``1 - (1 - m) p``: ``m`` is ``min_lr_ratio``, ``p`` the share of the steps after the warm-up that are done.

    Args:
        min_lr_ratio: Final learning rate as a share of the peak.
    """

    curve = "linear"

    def __init__(self, min_lr_ratio: Share = 0.0) -> None:
        self.minimum = min_lr_ratio

    @override
    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        progress = 1.0 if step >= total_steps else (step - warmup_steps) / (total_steps - warmup_steps)
        if self.curve == "cosine":
            return self.minimum + (1.0 - self.minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0 - (1.0 - self.minimum) * (math.sqrt(progress) if self.curve == "sqrt" else progress)


@SCHEDULERS.register("cosine")
class Cosine(Linear):
    """``m + (1 - m) (1 + cos(pi p)) / 2``, with ``m`` and ``p`` as in :class:`Linear`.

    Args:
        min_lr_ratio: Final learning rate as a share of the peak.
    """

    curve = "cosine"


@SCHEDULERS.register("wsd")
class WarmupStableDecay(Linear):
    """The peak until the decay at the end (MiniCPM, arXiv:2404.06395).

    Args:
        min_lr_ratio: Final learning rate as a share of the peak.
        decay_ratio: Share of all steps, at the end, in which the rate falls; one step at least.
        decay_shape: How it falls; sqrt is 1 - sqrt(share of the decay done) (arXiv:2405.18392).
    """

    def __init__(
        self, min_lr_ratio: Share = 0.0, decay_ratio: Annotated[float, Gt(0.0), Le(1.0)] = 0.1,
        decay_shape: Literal["linear", "cosine", "sqrt"] = "linear",
    ) -> None:  # fmt: skip
        super().__init__(min_lr_ratio)
        self.curve, self.ratio = decay_shape, decay_ratio

    @override
    def steps_needed(self, total_steps: int) -> int:
        return max(1, round(total_steps * self.ratio))

    @override
    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        start = total_steps - self.steps_needed(total_steps)
        return super().factor(max(step, start), total_steps, start)


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
        """Continue after the steps that were done, with the optimizer's peak rates."""
        self.last_epoch = state_dict["last_epoch"]
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        # Rates may be tensors: these are others than the groups', which the next step writes into.
        self._last_lr = self.get_lr()
