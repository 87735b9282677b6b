"""Two small facts that reductions over shards need."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor that may be a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to sum in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
