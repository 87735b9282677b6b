"""Facts about tensors and their storages, operations on many at once, and a mode that sees every operation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "TorchDispatchMode",
    "WrittenStorages",
    "lerp",
    "multiply",
    "norms",
    "same_values",
    "shard_box",
    "storage_key",
    "with_shard",
]


def shard_box(tensor: DTensor) -> tuple[slice, ...]:
    """Return the part of the whole tensor that this rank holds."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def with_shard(tensor: DTensor, shard: Tensor) -> DTensor:
    """Return a tensor that is distributed as ``tensor`` is, with another shard, which may lie on another device."""
    return DTensor(shard, tensor._spec, requires_grad=False)


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are views of the same values."""
    return (
        first.data_ptr() == second.data_ptr()
        and first.numel() == second.numel()
        and first.dtype == second.dtype
        and first._version == second._version
    )


def multiply(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply every tensor by ``factor``, in place, in one kernel launch."""
    torch._foreach_mul_(list(tensors), factor)


def lerp(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Move every tensor towards the one of ``ends`` by ``weight`` of their difference, in place."""
    torch._foreach_lerp_(list(tensors), list(ends), weight)


def norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the 2-norm of every tensor, 0-d in ``dtype``; at least one, all on one device and in one format."""
    return tuple(torch._foreach_norm(list(tensors), 2, dtype=dtype))


def storage_key(tensor: Tensor) -> int:
    """Return a number that tensors share which share a storage; it need not have memory."""
    return int(tensor.untyped_storage()._cdata)


class WrittenStorages(TorchDispatchMode):
    """Records the storages that in-place operations write to, by :func:`storage_key`."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and isinstance(args[0], Tensor):
            self.keys.add(storage_key(args[0]))
        return func(*args, **(kwargs or {}))
