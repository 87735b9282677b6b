"""Parameters by the names that the user's module gives them, under any wrapper."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from veomni.errors import ConfigError
from veomni.parallel.wrappers import FSDP1_PREFIX, plain_name
from veomni.registry import did_you_mean


def parameter_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return all names of every parameter; a tied one has several."""
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in inner_module(model).named_parameters(remove_duplicate=False):
        names[parameter].append(plain_name(name))
    return names


def inner_module(model: nn.Module) -> nn.Module:
    """Return the module inside ``DistributedDataParallel``, or ``model`` itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def is_fsdp1(model: nn.Module) -> bool:
    """Whether FSDP1 wraps the model, or a part of it."""
    return any(FSDP1_PREFIX[:-1] in name for name, _ in model.named_modules())


def matching(names: Iterable[str], patterns: Sequence[str], key: str, *, may_miss: Sequence[str] = ()) -> set[str]:
    """Return the names that shell patterns match, in full or as the module that the parameter is in.

    Args:
        names: Of parameters.
        patterns: ``*.embed_tokens`` or ``model.layers.0.*``.
        key: The argument that the patterns were given as.
        may_miss: Patterns that need not match.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    everyone = list(names)
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in everyone if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not hits and pattern not in may_miss:
            raise ConfigError(f"{key}: no parameter matches {pattern!r}", did_you_mean(pattern, everyone))
        found |= hits
    return found
