"""Which parameters weight decay applies to, under any wrapper and sharding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from veomni.errors import ModelError
from veomni.optim.names import is_fsdp1, matching, parameter_names
from veomni.parallel.wrappers import fsdp1_parameters

_COVERED_ANYWAY = ("*norm*", "*.bias")


def build_optimizer_groups(model: nn.Module, *, weight_decay: float, no_decay: Sequence[str]) -> list[dict[str, Any]]:
    """Split the trained parameters into a group with weight decay and one without.

    Parameters of fewer than two dimensions (norms, sinks) and biases are never decayed; matrices are, embeddings
    included, unless ``no_decay`` names them. A tied parameter comes once, and is named by any of its names. The split
    is the same in every layout. Under FSDP1 this is collective.

    Args:
        model: The model, before or after a strategy took it over.
        weight_decay: Of the first group.
        no_decay: Shell patterns of parameter or module names: ``*.embed_tokens`` or ``model.layers.0.*``.

    Returns:
        At most two groups, in the model's order, with ``params`` and ``weight_decay``; empty ones are left out.

    Raises:
        ConfigError: a pattern matches nothing (the two that say what is never decayed anyway, ``*norm*`` and
            ``*.bias``, may).
        ModelError: no parameter is trained.
    """
    names = parameter_names(model)
    everyone = [name for aliases in names.values() for name in aliases]
    exempt = matching(everyone, no_decay, "no_decay", may_miss=_COVERED_ANYWAY)
    dimensions = _unsharded_dimensions(model)
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter, aliases in names.items():
        if parameter.requires_grad:
            vector = dimensions.get(aliases[0], parameter.ndim) < 2 or aliases[0].endswith("bias")
            (kept if vector or exempt.intersection(aliases) else decayed).append(parameter)
    if not decayed and not kept:
        raise ModelError("every parameter of the model is frozen", "leave something to train")
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _unsharded_dimensions(model: nn.Module) -> dict[str, int]:
    """Return the number of dimensions of FSDP1's parameters, whose shards are flat; empty for other models."""
    return {name: parameter.ndim for name, parameter in fsdp1_parameters(model)} if is_fsdp1(model) else {}
