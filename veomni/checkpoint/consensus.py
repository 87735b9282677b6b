"""One outcome on all ranks: what one of them found or failed at is returned on each."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def rank_and_size() -> tuple[int, int]:
    """Return this rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's ``value``, in order of rank."""
    values: list[Any] = [value] * rank_and_size()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def from_rank_zero(value: Any) -> Any:
    """Return rank 0's ``value`` on all ranks."""
    return gather(value)[0]


def first_problem(problem: Any | None, group: dist.ProcessGroup | None = None) -> Any | None:
    """Return the first rank's ``problem``, or None when no rank has one."""
    return next((found for found in gather(problem, group) if found is not None), None)
