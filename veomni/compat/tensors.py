"""Facts about tensors: which part of a DTensor is here, and whether two tensors are the same values."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from veomni.compat.private_name import PrivateName

PRIVATE = (
    PrivateName(
        "torch.distributed.tensor._utils:compute_local_shape_and_global_offset",
        reason="the place of a rank's shard in the whole tensor, for weights that are read shard by shard",
        without="every rank reads whole tensors",
        parameters=("global_shape", "mesh", "placements"),
    ),
    PrivateName(
        "torch:Tensor._version",
        reason="whether a tensor was changed in place since it was given",
        without="shared experts do not run ahead",
    ),
)


def shard_box(tensor: DTensor) -> tuple[slice, ...]:
    """Return the part of the whole tensor that this rank holds."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are views of the same values."""
    return (
        first.data_ptr() == second.data_ptr()
        and first.numel() == second.numel()
        and first.dtype == second.dtype
        and first._version == second._version
    )
