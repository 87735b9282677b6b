"""Learning rates of parts of a model, as shares of the run's: a tower that is trained more gently than the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from veomni.errors import ConfigError
from veomni.optim.names import matching, parameter_names

_KEY = "lr_scale"


def split_by_lr_scale(
    model: nn.Module, groups: list[dict[str, Any]], lr_scale: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Split groups so that each has parameters of one factor, and note it in them; :func:`scale_lr` applies it.

    Args:
        model: What the groups are of.
        groups: From :func:`~veomni.optim.build_optimizer_groups`.
        lr_scale: Shell patterns of parameter or module names to factors of the learning rate; the last that matches a
            parameter counts.

    Raises:
        ConfigError: a pattern matches nothing, or a factor is not positive.
    """
    names = parameter_names(model)
    everyone = [name for aliases in names.values() for name in aliases]
    factors = dict.fromkeys(names, 1.0)
    for pattern, factor in lr_scale.items():
        if factor <= 0:
            raise ConfigError(
                f"lr_scale: {pattern!r} is given {factor}",
                "use a factor above 0; freeze() is for parameters that are not trained",
            )
        found = matching(everyone, [pattern], "lr_scale")
        factors |= {parameter: factor for parameter, aliases in names.items() if found.intersection(aliases)}
    split = []
    for group in groups:
        found_here = dict.fromkeys(factors[parameter] for parameter in group["params"])
        for factor in sorted(found_here, key=lambda factor: factor != 1.0):  # the first group's rate is the run's
            members = [parameter for parameter in group["params"] if factors[parameter] == factor]
            split.append({**group, "params": members, **({} if factor == 1.0 else {_KEY: factor})})
    return split


def scale_lr(optimizer: Optimizer) -> Optimizer:
    """Give the groups of an optimizer their share of its learning rate; to be called once, before a schedule."""
    for group in optimizer.param_groups:
        group["lr"] *= group.pop(_KEY, 1.0)
    return optimizer
