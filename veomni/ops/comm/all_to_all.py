"""All-to-all of rows, differentiable: blocking, or started now and awaited later; and one step round a ring."""

from __future__ import annotations

from collections.abc import Sequence
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


def all_to_all(tensor: Tensor, splits: Splits | None, group: ProcessGroup) -> Tensor:
    """Send rows to the ranks of a group and return the rows received, both in the order of the ranks.

    ``splits`` are the rows for each rank and from each; None divides them evenly.
    """
    return AsyncAllToAll.start(tensor, splits, group, async_op=False).wait()


class AsyncAllToAll:
    """An exchange in flight: ``exchange = AsyncAllToAll.start(...)``, other work, ``exchange.wait()``.

    Its gradient is the exchange back, which starts where the forward waited and is awaited where the forward started.
    What the autograd graph keeps refers neither to this handle, which holds the buffers, nor to an output: a circle
    would keep every step's buffers until a full run of Python's collector.
    """

    def __init__(self, route: _Route | None) -> None:
        self._back = _Back(route)
        self._transfer: _Transfer | None = None
        self._received: Tensor | None = None

    # A graph that holds a process group, or sizes that depend on the data, cannot be compiled.
    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def start(
        tensor: Tensor, splits: Splits | None, group: ProcessGroup | None, *, async_op: bool = True
    ) -> AsyncAllToAll:
        """Start to send rows; arguments are those of :func:`all_to_all`, a group of None keeps them on this rank."""
        exchange = AsyncAllToAll(None if group is None else _Route(splits, group, async_op))
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
    async_op: bool

    def back(self) -> _Route:
        return self._replace(splits=self.splits and self.splits.back())


class _Transfer:
    """A collective that may be in flight, and the tensors that must live as long as it."""

    def __init__(self, tensor: Tensor, route: _Route) -> None:
        sent, received = route.splits or (None, None)
        self.sent = tensor.contiguous()
        self.received = tensor.new_empty(len(tensor) if received is None else sum(received), *tensor.shape[1:])
        self._work = dist.all_to_all_single(
            self.received, self.sent, received, sent, group=route.group, async_op=route.async_op
        )

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self.received


class _Back:
    """The way back of an exchange, shared by the two nodes of the graph."""

    def __init__(self, route: _Route | None) -> None:
        self.route = route
        self.transfer: _Transfer | None = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, exchange: AsyncAllToAll) -> Tensor:
        ctx.back = exchange._back
        exchange._transfer = _Transfer(tensor, ctx.back.route)
        return exchange._transfer.received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        transfer, ctx.back.transfer = ctx.back.transfer, None
        return transfer.wait(), None


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
        ctx.back.transfer = _Transfer(grads[0], ctx.back.route.back())
        return ctx.back.transfer.sent, None  # autograd needs a tensor of their shape, not of what is received


class RingStep:
    """Tensors in flight to the next rank of a ring, while those of the rank before come in; without a gradient.

    An all-to-all in which only neighbours have something for each other: unlike sends and receives it works on every
    backend and device that Ulysses works on, and needs no order to keep two ranks from waiting for each other. Tensors
    have the same shapes and dtype on all ranks.
    """

    def __init__(self, tensors: Sequence[Tensor], group: ProcessGroup) -> None:
        self._shapes = [tensor.shape for tensor in tensors]
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        size, rank = group.size(), group.rank()
        splits = Splits([0] * size, [0] * size)
        splits.sent[(rank + 1) % size] = splits.received[(rank - 1) % size] = len(flat)
        self._exchange = AsyncAllToAll.start(flat, splits, group)

    def wait(self) -> list[Tensor]:
        """Return the tensors of the rank before; to be called once."""
        parts = self._exchange.wait().split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
