"""What all ranks agree on: one small reduction on the CPU."""

from collections.abc import Mapping

import torch
import torch.distributed as dist


def sync_step(counts: Mapping[str, float]) -> dict[str, float]:
    """Return the sum of every count over all ranks; collective.

    Args:
        counts: By the same names in the same order on every rank. They travel as float64, exact up to 2^53.
    """
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
