"""The user's module and its names under any wrapper; parameters whole, and in the shards that a rank holds."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

FSDP1_PREFIX = "_fsdp_wrapped_module."
"""What FSDP1 puts into the names of what it wraps."""
_WRAPPERS = (FSDP1_PREFIX, "_checkpoint_wrapped_module.", "_orig_mod.")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside DistributedDataParallel and FullyShardedDataParallel."""
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

    With ``rank0_only`` they are gathered on rank 0; other ranks get what they have.
    """
    for path, unit in list(model.named_modules()):
        if not isinstance(unit, FullyShardedDataParallel):
            continue
        whole = FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False, rank0_only=rank0_only)
        with torch.no_grad(), whole:
            for name, parameter in unit.module.named_parameters():
                if FSDP1_PREFIX not in name:  # the others belong to units inside this one
                    yield plain_name(f"{path}.{name}" if path else name), parameter


def local_shard(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor that may be a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to sum in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
