"""Which part of a parameter this rank holds, and how to copy it there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Box = tuple[slice, ...]
"""One slice per dimension of a full tensor."""


def allocate_like(tensor: Tensor, device: torch.device) -> Tensor:
    """Return storage on ``device`` for a meta parameter or buffer: its shard for a DTensor, all of it otherwise."""
    with torch.no_grad():
        storage = torch.empty_like(tensor, device=device)
    return nn.Parameter(storage, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else storage


def local_box(tensor: Tensor) -> Box:
    """Return the part of the full tensor that ``tensor`` holds on this rank; some slices may be empty."""
    from torch.distributed.tensor import DTensor

    from veomni.compat.tensors import shard_box

    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    return shard_box(tensor)


def is_empty(box: Box) -> bool:
    """Whether a box holds no element."""
    return any(part.stop <= part.start for part in box)


def copy_into(tensor: Tensor, part: Tensor) -> None:
    """Copy this rank's part into ``tensor``, casting to its dtype."""
    from veomni.parallel.tensors import local_shard

    with torch.no_grad():
        local_shard(tensor).copy_(part)
