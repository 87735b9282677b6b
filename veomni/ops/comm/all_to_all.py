"""All-to-all of rows, differentiable: blocking, or started now and awaited later.

The gradient of an exchange is the exchange back. That of an asynchronous one mirrors its timing: it starts where the
forward waited and is awaited where the forward started, so that what overlaps in the forward overlaps in the backward.

Only the caller's handle refers to a buffer in flight. What the autograd graph keeps refers neither to the handle nor to
an output: a circle through the graph would keep every step's buffers until a full run of Python's collector.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Splits(NamedTuple):
    """Rows (entries of the first dimension) that this rank sends to each rank of a group, and receives from each."""

    sent: list[int]
    received: list[int]

    def back(self) -> Splits:
        """Return the splits of the exchange in the other direction."""
        return Splits(self.received, self.sent)


# A graph that holds a process group, or sizes that depend on the data, cannot be compiled.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def all_to_all(tensor: Tensor, splits: Splits | None, group: ProcessGroup) -> Tensor:
    """Send rows to the ranks of a group and return the rows received, in the order of the ranks.

    Args:
        tensor: ``[rows, ...]``, the rows for one rank behind those for the other.
        splits: Rows for each rank and from each; None divides the rows evenly.
        group: The ranks.
    """
    result: Tensor = _AllToAll.apply(tensor, _Route(splits, group))
    return result


class AsyncAllToAll:
    """An exchange in flight: ``exchange = AsyncAllToAll.start(...)``, other work, ``exchange.wait()``."""

    def __init__(self, route: _Route | None) -> None:
        self._back = _Back(route)
        self._transfer: _Transfer | None = None
        self._received: Tensor | None = None

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def start(tensor: Tensor, splits: Splits | None, group: ProcessGroup | None) -> AsyncAllToAll:
        """Start to send rows; arguments are those of :func:`all_to_all`, a group of None keeps them on this rank."""
        exchange = AsyncAllToAll(None if group is None else _Route(splits, group))
        exchange._received = tensor if group is None else _Start.apply(tensor, exchange)
        return exchange

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def wait(self) -> Tensor:
        """Return the rows received, and release the buffers; to be called once."""
        received, self._received = self._received, None
        assert received is not None, "the exchange was awaited before"
        result: Tensor = received if self._back.route is None else _Wait.apply(received, self)
        return result


class _Route(NamedTuple):
    splits: Splits | None
    group: ProcessGroup

    def back(self) -> _Route:
        return _Route(None if self.splits is None else self.splits.back(), self.group)


class _Transfer:
    """One collective in flight, and the tensors that must live as long as it."""

    def __init__(self, tensor: Tensor, route: _Route, *, async_op: bool = True) -> None:
        splits, group = route
        sent, received = (None, None) if splits is None else splits
        rows = len(tensor) if received is None else sum(received)
        self.sent = tensor.contiguous()
        self.received = tensor.new_empty(rows, *tensor.shape[1:])
        self._work = dist.all_to_all_single(self.received, self.sent, received, sent, group=group, async_op=async_op)

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self.received


class _Back:
    """The way back of an exchange, shared by the two nodes of the graph."""

    def __init__(self, route: _Route | None) -> None:
        self.route = route
        self.transfer: _Transfer | None = None

    def start(self, grad: Tensor) -> Tensor:
        """Start to send gradients and return them: autograd needs a tensor of their shape, not of what is received."""
        assert self.route is not None
        self.transfer = _Transfer(grad, self.route.back())
        return self.transfer.sent

    def wait(self) -> Tensor:
        transfer, self.transfer = self.transfer, None
        assert transfer is not None
        return transfer.wait()


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        return _Transfer(tensor, route, async_op=False).received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Transfer(grads[0], ctx.route.back(), async_op=False).received, None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, exchange: AsyncAllToAll) -> Tensor:
        ctx.back = exchange._back
        assert ctx.back.route is not None
        exchange._transfer = _Transfer(tensor, ctx.back.route)
        return exchange._transfer.received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.back.wait(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, received: Tensor, exchange: AsyncAllToAll) -> Tensor:
        ctx.back = exchange._back
        transfer, exchange._transfer = exchange._transfer, None
        assert transfer is not None
        transfer.wait()
        return received.view_as(received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.back.start(grads[0]), None


__all__ = ["AsyncAllToAll", "Splits", "all_to_all"]
