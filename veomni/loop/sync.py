"""What all ranks agree on: one small reduction on the CPU."""

from collections.abc import Mapping

import torch
import torch.distributed as dist


def sync_step(counts: Mapping[str, float]) -> dict[str, float]:
    """Return sums over all ranks, exact up to 2^53, of counts with the same names in the same order; collective."""
    sums = torch.tensor(list(counts.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(counts, sums.tolist(), strict=True))


def extremes(value: float) -> tuple[float, float]:
    """Return the least and the greatest of a number over all ranks; collective."""
    if not dist.is_initialized():
        return value, value
    ends = torch.tensor([value, -value], dtype=torch.float64)
    dist.all_reduce(ends, op=dist.ReduceOp.MIN)
    return ends[0].item(), -ends[1].item()
