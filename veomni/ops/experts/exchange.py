"""Experts that are spread over ranks: tokens are dispatched to them and their results combined.

Every rank of the group holds ``num_experts / P`` experts of a layer, in order. Its tokens are sorted by expert, sent to
the ranks that hold those (one all-to-all of counts, one of rows), sorted there by local expert, run, and sent back the
same way; each token's results are weighted and summed where it came from. No token is dropped, however uneven the
choice. Gradients are the exact ones of the whole computation: those of an expert are the sum over all tokens that any
rank of the group sent it.

With several chunks, one chunk's tokens are in flight while the experts run on another's; the backward mirrors it. The
idea is that of the VeOmni paper (arXiv:2508.02317) and of COMET (arXiv:2502.19811).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from veomni.ops.comm.all_to_all import AsyncAllToAll, Splits, all_to_all
from veomni.ops.experts.permute import Routing, combine_rows, gather_rows, inverse_of, permute_tokens, route
from veomni.ops.experts.shared import SharedExperts

RunExperts = Callable[[Tensor, Tensor], Tensor]
"""Rows ``[rows, hidden]`` sorted by local expert and int32 offsets ``[local_experts]`` to the experts' outputs."""


EXCHANGE = "expert_exchange"
"""The attribute of a module with a shard of the experts for how tokens reach the others."""


@dataclass(frozen=True)
class ExpertExchange:
    """How a module's tokens reach experts on other ranks.

    Attributes:
        group: The ranks that share the experts.
        chunks: Parts of the tokens, sent one behind the other.
        fixed_size: Exchange buffers of the largest size that could be needed, so that the host reads nothing from the
            device; costs up to P times the memory of the rows.
        shared: The shared experts of the same block, which run while the first tokens are in flight, or None.
    """

    group: ProcessGroup
    chunks: int = 1
    fixed_size: bool = False
    shared: SharedExperts | None = None


# A graph that holds a process group, or sizes that depend on the data, cannot be compiled.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def exchange_experts(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, num_experts: int, run: RunExperts,
    exchange: ExpertExchange,
) -> Tensor:  # fmt: skip
    """Return the weighted sum over each token's experts, wherever they are, ``[tokens, hidden]``.

    Args:
        hidden: This rank's tokens, ``[tokens, hidden]``.
        top_k_index: The experts of each, int64 ``[tokens, k]``, counted over all ranks.
        top_k_weights: Their weights, ``[tokens, k]``.
        num_experts: Experts of the layer over all ranks of the group.
        run: Runs the experts of this rank.
        exchange: The ranks, and how.
    """
    shared = exchange.shared
    dispatch = shared.take_dispatch(hidden, top_k_index) if shared is not None else None
    if dispatch is None:
        dispatch = Dispatch(hidden, top_k_index, num_experts, exchange)
        if shared is not None:
            shared.run_ahead(hidden)
    return dispatch.combine(top_k_weights, run)


class Dispatch:
    """Tokens sent to their experts chunk by chunk; the first chunk is in flight."""

    def __init__(self, hidden: Tensor, top_k_index: Tensor, num_experts: int, exchange: ExpertExchange) -> None:
        parts = zip(hidden.chunk(exchange.chunks), top_k_index.chunk(exchange.chunks), strict=True)
        self.chunks = [_Chunk(tokens, index, num_experts) for tokens, index in parts]
        counts = torch.stack([chunk.routing.counts for chunk in self.chunks]).unflatten(1, (exchange.group.size(), -1))
        received = all_to_all(counts.transpose(0, 1).contiguous(), None, exchange.group).transpose(0, 1)
        layouts = _fixed_layouts if exchange.fixed_size else _exact_layouts
        for chunk, layout in zip(self.chunks, layouts(self.chunks, counts, received, exchange.group), strict=True):
            chunk.layout = layout
        self.chunks[0].dispatch()

    def combine(self, weights: Tensor, run: RunExperts) -> Tensor:
        """Run the experts and return each token's weighted sum, ``[tokens, hidden]``."""
        results: list[Tensor] = []
        shares = weights.chunk(len(self.chunks))
        for index, chunk in enumerate(self.chunks):
            if index + 1 < len(self.chunks):
                self.chunks[index + 1].dispatch()
            chunk.run_experts(run)
            if index:
                results.append(self.chunks[index - 1].combine(shares[index - 1]))
        results.append(self.chunks[-1].combine(shares[-1]))
        return torch.cat(results) if len(results) > 1 else results[0]

    def cancel(self) -> None:
        """Wait for the chunk in flight and discard it."""
        self.chunks[0].exchange.wait()


@dataclass(frozen=True)
class _Layout:
    """How the rows of a chunk lie in the buffers that are sent.

    Attributes:
        group: The ranks.
        offsets: Where each local expert's rows end once they are sorted, int32 ``[local_experts]``.
        by_expert: Of every sorted row, its place among those that arrived; and the inverse.
        rows: This rank's rows; the last of them are not sent where a token was sent to no expert.
        splits: Rows sent to each rank and received from each, or None where all buffers have one size.
        slots: Places of this rank's rows in the buffer that is sent (behind it: not sent), or None where they fill it.
        room: Rows of that buffer.
    """

    group: ProcessGroup
    offsets: Tensor
    by_expert: Tensor
    inverse: Tensor
    rows: int
    splits: Splits | None
    slots: Tensor | None
    room: int

    @classmethod
    def of(
        cls, group: ProcessGroup, arriving: Tensor, experts: Tensor, rows: int, splits: Splits | None,
        slots: Tensor | None = None, room: int = 0,
    ) -> Self:  # fmt: skip
        """Return the layout that sorts ``arriving`` rows, of ``experts`` in the order of arrival, by expert."""
        offsets, by_expert = arriving.sum(0).cumsum(0).to(torch.int32), experts.argsort(stable=True)
        return cls(group, offsets, by_expert, inverse_of(by_expert), rows, splits, slots, room)

    def pack(self, rows: Tensor) -> Tensor:
        """Put this rank's rows, sorted by expert, into the buffer that is sent."""
        if self.slots is None:
            return rows.narrow(0, 0, sum(self.splits.sent if self.splits else ()))
        return rows.new_zeros(self.room + 1, rows.shape[1]).index_copy(0, self.slots, rows)[:-1]

    def unpack(self, buffer: Tensor) -> Tensor:
        """Take this rank's rows, sorted by expert, from where they arrived; those of no expert are zeros."""
        if self.slots is None:
            return F.pad(buffer, (0, 0, 0, self.rows - len(buffer))) if len(buffer) < self.rows else buffer
        return F.pad(buffer, (0, 0, 0, 1)).index_select(0, self.slots)


# Counts of rows are int64 [chunks, P, local_experts]: those for each expert of each rank, and those from each rank.


def _exact_layouts(
    chunks: Sequence[_Chunk], counts: Tensor, received: Tensor, group: ProcessGroup
) -> Iterator[_Layout]:
    """Yield buffers of exactly the rows that are sent. Their sizes are read by the host, for all chunks at once."""
    sizes = zip(*torch.stack([counts.sum(2), received.sum(2)]).tolist(), strict=True)
    for chunk, arriving, (sent, arrived) in zip(chunks, received, sizes, strict=True):
        segments = arriving.flatten()
        experts = torch.arange(len(segments), device=segments.device) % arriving.shape[1]
        experts = experts.repeat_interleave(segments, output_size=sum(arrived))
        yield _Layout.of(group, arriving, experts, chunk.index.numel(), Splits(sent, arrived))


def _fixed_layouts(
    chunks: Sequence[_Chunk], counts: Tensor, received: Tensor, group: ProcessGroup
) -> Iterator[_Layout]:
    """Yield buffers with room for the most rows a rank could get; rows that are not there sort behind all experts."""
    _, ranks, local = received.shape
    for chunk, sent, arriving in zip(chunks, counts.sum(2), received, strict=True):
        tokens, top_k = chunk.index.shape
        rows, room = tokens * top_k, tokens * min(top_k, local)
        places = torch.arange(room, device=received.device).expand(ranks, room).contiguous()
        experts = torch.searchsorted(arriving.cumsum(1), places, right=True)
        row, ends = torch.arange(rows, device=sent.device), sent.cumsum(0)
        rank_of_row = torch.searchsorted(ends, row, right=True)
        starts = F.pad(ends, (1, 0))  # the last: of rows that go nowhere
        slots = (rank_of_row * room + row - starts[rank_of_row]).clamp(max=ranks * room)
        yield _Layout.of(group, arriving, experts.flatten(), rows, None, slots, ranks * room)


class _Chunk:
    """A chunk of tokens ``[tokens, hidden]`` for experts ``[tokens, k]``: dispatched, run, combined."""

    layout: _Layout
    exchange: AsyncAllToAll

    def __init__(self, tokens: Tensor, index: Tensor, num_experts: int) -> None:
        self.tokens, self.index = tokens, index
        self.routing: Routing = route(index, num_experts)

    def dispatch(self) -> None:
        """Send the rows to the ranks of their experts."""
        rows, layout = permute_tokens(self.tokens, self.routing), self.layout
        self.exchange = AsyncAllToAll.start(layout.pack(rows), layout.splits, layout.group)

    def run_experts(self, run: RunExperts) -> None:
        """Run this rank's experts on the rows received and send the results back."""
        layout = self.layout
        rows = gather_rows(self.exchange.wait(), layout.by_expert, layout.inverse)
        results = gather_rows(run(rows, layout.offsets), layout.inverse, layout.by_expert)
        self.exchange = AsyncAllToAll.start(results, layout.splits and layout.splits.back(), layout.group)

    def combine(self, weights: Tensor) -> Tensor:
        """Return each token's sum, weighted by ``[tokens, k]``."""
        return combine_rows(self.layout.unpack(self.exchange.wait()), self.routing, weights)
