"""The user's module, its names and its whole parameters, under any wrapper."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

FSDP1_PREFIX = "_fsdp_wrapped_module."
"""What FSDP1 puts into the names of what it wraps."""

_WRAPPERS = (FSDP1_PREFIX, "_checkpoint_wrapped_module.", "_orig_mod.")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside DistributedDataParallel and FullyShardedDataParallel."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    while isinstance(model, DistributedDataParallel | FullyShardedDataParallel):
        model = model.module
    return model


def plain_name(name: str) -> str:
    """Return a name without what wrappers of modules put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def fsdp1_parameters(model: nn.Module, *, rank0_only: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield FSDP1's parameters in their own shapes, one unit at a time: valid until the next one; collective.

    Args:
        model: The model, wrapped by FSDP1 as a whole or in parts.
        rank0_only: Gather on rank 0 only; other ranks see what they have.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    for path, unit in list(model.named_modules()):
        if not isinstance(unit, FullyShardedDataParallel):
            continue
        whole = FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False, rank0_only=rank0_only)
        with torch.no_grad(), whole:
            for name, parameter in unit.module.named_parameters():
                if FSDP1_PREFIX not in name:  # the others belong to units inside this one
                    yield plain_name(f"{path}.{name}" if path else name), parameter
