"""All-to-all of equal shares, at once or in flight: compiled graphs contain it, a recomputation may keep its result."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from veomni.compat.collectives import await_collective, group_named, start_all_to_all


def exchange_evenly(rows: Tensor, group: ProcessGroup) -> Tensor:
    """Send each of the P ranks of a group its share of the rows, and return the rows received in the order of ranks.

    Rows are entries of the first dimension, a multiple of P. The gradient is the exchange back.
    """
    received: Tensor = _exchange(rows, group.group_name)
    return received


def start_exchange(rows: Tensor, group: ProcessGroup) -> Tensor:
    """Start an exchange of one entry of the first dimension for each rank; return room that is filled meanwhile.

    Only :func:`finish_exchange` may read it. Its gradient is the exchange back, which starts where the forward was
    awaited, and is awaited where the forward started.
    """
    room: Tensor = _Start.apply(rows, group.size(), group.group_name)
    return room


def finish_exchange(room: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rows received, when they are there."""
    received: Tensor = _Finish.apply(room, group.size(), group.group_name)
    return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, size: int, group: str) -> Tensor:
        return start_all_to_all(rows.contiguous(), size, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return await_collective(grad), None, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, room: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return await_collective(room).view_as(room)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return start_all_to_all(grad.contiguous(), ctx.size, ctx.group), None, None


# A graph holds the name of a group where it cannot hold the group; what calls this guards it (``group_key``).
@torch.library.custom_op("veomni::exchange_evenly", mutates_args=())
def _exchange(rows: Tensor, group: str) -> Tensor:
    received = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, rows.contiguous(), group=group_named(group))
    return received


@_exchange.register_fake
def _shape(rows: Tensor, group: str) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _set_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.group = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _exchange(grad, ctx.group), None


_exchange.register_autograd(_backward, setup_context=_set_context)
