"""Which parameters weight decay applies to, whatever wraps or shards them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from veomni.errors import ConfigError, ModelError
from veomni.registry import did_you_mean

_FSDP1 = "_fsdp_wrapped_module."
_WRAPPERS = (_FSDP1, "_checkpoint_wrapped_module.", "_orig_mod.")
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
    names = _names(model)
    exempt = _matching([name for aliases in names.values() for name in aliases], no_decay)
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


def _names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        names[parameter].append(_plain(name))
    return names


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _matching(names: list[str], patterns: Sequence[str]) -> set[str]:
    matching: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not found and pattern not in _COVERED_ANYWAY:
            raise ConfigError(
                f"train.optimizer.no_decay: no parameter matches {pattern!r}", did_you_mean(pattern, names)
            )
        matching |= found
    return matching


def _unsharded_dimensions(model: nn.Module) -> dict[str, int]:
    """Return the number of dimensions of FSDP1's parameters, whose shards are flat; empty for other models."""
    return dict(_fsdp1_dimensions(model)) if any(_FSDP1[:-1] in name for name, _ in model.named_modules()) else {}


def _fsdp1_dimensions(model: nn.Module) -> Iterator[tuple[str, int]]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for path, unit in list(model.named_modules()):
        if not isinstance(unit, FullyShardedDataParallel):
            continue
        whole = FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False)
        with torch.no_grad(), whole:
            for name, parameter in unit.module.named_parameters():
                if _FSDP1 not in name:  # the others belong to units inside this one
                    yield _plain(f"{path}.{name}" if path else name), parameter.ndim
