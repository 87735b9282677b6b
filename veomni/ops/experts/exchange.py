"""Experts that are spread over ranks: tokens travel to them and back.

Every rank of the group holds ``num_experts / P`` experts of a layer, in order. Its tokens are sorted by expert, sent to
the ranks that hold those (one all-to-all of counts, one of rows), sorted there by local expert, run, and sent back the
same way; each token's results are weighted and summed where it came from. No token is dropped, however uneven the
choice. Gradients are the exact ones of the whole computation: those of an expert are the sum over all tokens that any
rank of the group sent it.

With several chunks, one chunk's tokens travel while the experts work on another's; the backward mirrors it. The idea is
that of the VeOmni paper (arXiv:2508.02317) and of COMET (arXiv:2502.19811).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from veomni.ops.experts.permute import combine_rows, gather_rows, permute_tokens
from veomni.ops.experts.routing import Routing, route
from veomni.ops.experts.shared import SharedExperts

RunExperts = Callable[[Tensor, Tensor], Tensor]
"""Rows ``[rows, hidden]`` sorted by local expert and int32 offsets ``[local_experts]`` to the experts' outputs."""


EXCHANGE = "expert_exchange"
"""The attribute by which a module that holds a part of the experts knows how to reach the others."""


@dataclass(frozen=True)
class ExpertExchange:
    """How a module's tokens reach experts on other ranks.

    Attributes:
        group: The ranks that share the experts.
        chunks: Parts of the tokens that travel one behind the other.
        fixed_size: Exchange buffers of the largest size that could be needed, so that the host reads nothing from the
            device; costs up to P times the memory of the rows.
        shared: The shared experts of the same block, which run while the first tokens travel, or None.
    """

    group: ProcessGroup
    chunks: int = 1
    fixed_size: bool = False
    shared: SharedExperts | None = None


# A graph that holds a process group, or sizes that depend on the data, cannot be compiled.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def exchange_experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    num_experts: int,
    run: RunExperts,
    exchange: ExpertExchange,
) -> Tensor:
    """Run every token's experts, wherever they are.

    Args:
        hidden: This rank's tokens, ``[tokens, hidden]``.
        top_k_index: The experts of each, int64 ``[tokens, k]``, counted over all ranks.
        top_k_weights: Their weights, ``[tokens, k]``.
        num_experts: Experts of the layer over all ranks of the group.
        run: Runs the experts of this rank.
        exchange: The ranks, and how.

    Returns:
        ``[tokens, hidden]``: the weighted sum over each token's experts.
    """
    shared = exchange.shared
    departed = shared.take_departed(hidden, top_k_index) if shared is not None else None
    if departed is None:
        departed = Departed(hidden, top_k_index, num_experts, exchange)
        if shared is not None:
            shared.run_ahead(hidden)
    return departed.travel(top_k_weights, run)


class Departed:
    """Tokens on their way to their experts, chunk by chunk; the first chunk is under way."""

    def __init__(self, hidden: Tensor, top_k_index: Tensor, num_experts: int, exchange: ExpertExchange) -> None:
        parts = zip(hidden.chunk(exchange.chunks), top_k_index.chunk(exchange.chunks), strict=True)
        self.trips = [_Trip(tokens, index, num_experts) for tokens, index in parts]
        received = _exchange_counts([trip.routing for trip in self.trips], exchange.group)
        layouts = _fixed_layouts if exchange.fixed_size else _exact_layouts
        for trip, layout in zip(self.trips, layouts(self.trips, received, exchange.group), strict=True):
            trip.layout = layout
        self.trips[0].depart()

    def travel(self, weights: Tensor, run: RunExperts) -> Tensor:
        """Run the experts and return each token's weighted sum, ``[tokens, hidden]``."""
        results: list[Tensor] = []
        shares = weights.chunk(len(self.trips))
        for index, trip in enumerate(self.trips):
            if index + 1 < len(self.trips):
                self.trips[index + 1].depart()
            trip.visit(run)
            if index:
                results.append(self.trips[index - 1].come_home(shares[index - 1]))
        results.append(self.trips[-1].come_home(shares[-1]))
        return torch.cat(results) if len(results) > 1 else results[0]

    def cancel(self) -> None:
        """Wait for what is under way, and forget it."""
        self.trips[0].flight.wait()


def _exchange_counts(routings: Sequence[Routing], group: ProcessGroup) -> Tensor:
    """Return how many rows each rank sends to each expert of this rank, int64 ``[P, chunks, local_experts]``."""
    counts = torch.stack([routing.counts for routing in routings])
    sent = counts.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received


@dataclass(frozen=True)
class _Layout:
    """How the rows of a chunk lie in the buffers that travel.

    Attributes:
        group: The ranks.
        offsets: Where each local expert's rows end once they are sorted, int32 ``[local_experts]``.
        by_expert: Of every sorted row, its place among those that arrived; and the inverse.
        sent: Rows sent to each rank, or None where all buffers have one size.
        received: Rows received from each rank, or None.
        rows: This rank's rows; the last of them travel nowhere where a token was sent to no expert.
        slots: Places of this rank's rows in the buffer that travels (behind it: nowhere), or None where they fill it.
        room: Rows of that buffer.
    """

    group: ProcessGroup
    offsets: Tensor
    by_expert: Tensor
    inverse: Tensor
    rows: int
    sent: list[int] | None = None
    received: list[int] | None = None
    slots: Tensor | None = None
    room: int = 0

    def pack(self, rows: Tensor) -> Tensor:
        """Put this rank's rows, sorted by expert, where they travel from."""
        if self.slots is None:
            return rows.narrow(0, 0, sum(self.sent or ()))
        return rows.new_zeros(self.room + 1, rows.shape[1]).index_copy(0, self.slots, rows)[:-1]

    def unpack(self, buffer: Tensor) -> Tensor:
        """Take this rank's rows, sorted by expert, from where they arrived; those of no expert are zeros."""
        if self.slots is None:
            return F.pad(buffer, (0, 0, 0, self.rows - len(buffer))) if len(buffer) < self.rows else buffer
        return F.pad(buffer, (0, 0, 0, 1)).index_select(0, self.slots)


def _exact_layouts(trips: Sequence[_Trip], received: Tensor, group: ProcessGroup) -> list[_Layout]:
    """Buffers of exactly the rows that travel. Their sizes are read by the host, for all chunks at once."""
    ranks, chunks, local = received.shape
    counts = torch.stack([trip.routing.counts for trip in trips]).unflatten(1, (ranks, local))
    sent_sizes, received_sizes = torch.stack([counts.sum(2), received.sum(2).t()]).tolist()
    layouts = []
    for chunk, trip in zip(range(chunks), trips, strict=True):
        arriving, total = received[:, chunk], sum(received_sizes[chunk])
        local_ids = torch.arange(local, device=received.device).repeat(ranks)
        experts = local_ids.repeat_interleave(arriving.flatten(), output_size=total)
        by_expert = experts.argsort(stable=True)
        sizes = {"sent": sent_sizes[chunk], "received": received_sizes[chunk]}
        rows = len(trip.routing.order)
        layouts.append(_Layout(group, _ends(arriving), by_expert, _inverse(by_expert), rows, **sizes))
    return layouts


def _fixed_layouts(trips: Sequence[_Trip], received: Tensor, group: ProcessGroup) -> list[_Layout]:
    """Buffers with room for the most rows a rank could get; rows that are not there sort behind all experts."""
    ranks, chunks, local = received.shape
    layouts = []
    for chunk, trip in zip(range(chunks), trips, strict=True):
        rows = len(trip.routing.order)
        room = rows // trip.top_k * min(trip.top_k, local)
        places = torch.arange(room, device=received.device)
        arriving = received[:, chunk].contiguous()
        experts = torch.searchsorted(arriving.cumsum(1), places.expand(ranks, room).contiguous(), right=True)
        by_expert = experts.flatten().argsort(stable=True)
        sent = trip.routing.counts.unflatten(0, (ranks, local)).sum(1)
        row, ends = torch.arange(rows, device=sent.device), sent.cumsum(0)
        rank_of_row = torch.searchsorted(ends, row, right=True)
        starts = F.pad(ends, (1, 0))  # the last: of rows that go nowhere
        slots = (rank_of_row * room + row - starts[rank_of_row]).clamp(max=ranks * room)
        layouts.append(
            _Layout(group, _ends(arriving), by_expert, _inverse(by_expert), rows, slots=slots, room=ranks * room)
        )
    return layouts


def _ends(arriving: Tensor) -> Tensor:
    return arriving.sum(0).cumsum(0).to(torch.int32)


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


class _Trip:
    """One chunk of tokens: sent out, worked on, brought home.

    Args:
        tokens: ``[tokens, hidden]``.
        index: The experts of each, ``[tokens, k]``.
        num_experts: Experts of the layer over all ranks.
    """

    layout: _Layout
    flight: _Flight

    def __init__(self, tokens: Tensor, index: Tensor, num_experts: int) -> None:
        self.tokens, self.top_k = tokens, index.shape[1]
        self.routing: Routing = route(index, num_experts)

    def depart(self) -> None:
        """Send the rows to the ranks of their experts."""
        rows, layout = permute_tokens(self.tokens, self.routing, self.top_k), self.layout
        self.flight = _Flight(layout.pack(rows), layout.sent, layout.received, layout.group)

    def visit(self, run: RunExperts) -> None:
        """Run this rank's experts on what arrived and send the results back."""
        layout = self.layout
        rows = gather_rows(self.flight.land(), layout.by_expert, layout.inverse)
        results = gather_rows(run(rows, layout.offsets), layout.inverse, layout.by_expert)
        self.flight = _Flight(results, layout.received, layout.sent, layout.group)

    def come_home(self, weights: Tensor) -> Tensor:
        """Return each token's sum, weighted by ``[tokens, k]``."""
        return combine_rows(self.layout.unpack(self.flight.land()), self.routing, weights)


class _Flight:
    """Rows on their way to other ranks; their gradients take the way back, started and awaited as early and late."""

    def __init__(self, rows: Tensor, sent: list[int] | None, received: list[int] | None, group: ProcessGroup) -> None:
        self.sent, self.received, self.group = sent, received, group
        self.work: dist.Work | None = None
        self.cargo: tuple[Tensor, Tensor] | None = None  # must live as long as it travels
        self.buffer: Tensor = _Launch.apply(self, rows)

    def land(self) -> Tensor:
        """Wait, and return what arrived."""
        landed: Tensor = _Land.apply(self, self.buffer)
        return landed

    def start(self, rows: Tensor, sent: list[int] | None, received: list[int] | None) -> Tensor:
        rows = rows.contiguous()
        buffer = rows.new_empty(len(rows) if received is None else sum(received), rows.shape[1])
        self.cargo = rows, buffer
        self.work = dist.all_to_all_single(buffer, rows, received, sent, group=self.group, async_op=True)
        return buffer

    def wait(self) -> Tensor:
        """Return the buffer of the exchange under way once it is filled."""
        assert self.work is not None
        assert self.cargo is not None
        self.work.wait()
        buffer = self.cargo[1]
        self.work = self.cargo = None
        return buffer


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: _Flight, rows: Tensor) -> Tensor:
        ctx.flight = flight
        return flight.start(rows, flight.sent, flight.received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, ctx.flight.wait()


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: _Flight, buffer: Tensor) -> Tensor:
        ctx.flight = flight
        return flight.wait().view_as(buffer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        flight = ctx.flight
        flight.start(grads[0], flight.received, flight.sent)
        # What travels has other rows than arrived, and autograd wants as many: they only say that it is on its way.
        return None, grads[0]
