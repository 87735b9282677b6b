"""One outcome on all ranks: what one of them found or failed at, all of them know."""

from __future__ import annotations

import uuid
from typing import Any

import torch.distributed as dist


def rank_and_size() -> tuple[int, int]:
    """Return this rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's ``value``, in order of rank."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values


def from_rank_zero(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Return rank 0's ``value`` on all ranks."""
    return gather(value, group)[0]


def shared_token(group: dist.ProcessGroup | None = None) -> str:
    """Return a random name that is the same on all ranks."""
    return str(from_rank_zero(uuid.uuid4().hex[:12], group))


def first_problem(problem: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """Return the first rank's problem, with its rank, or None when no rank has one."""
    for rank, found in enumerate(gather(problem, group)):
        if found is not None:
            return f"rank {rank}: {found}"
    return None
