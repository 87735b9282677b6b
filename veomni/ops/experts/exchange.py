"""Experts that are spread over ranks: all-to-alls dispatch tokens to them, and combine the results; none is dropped.

With several chunks, one chunk's tokens are in flight while the experts run on another's; the backward mirrors it, as in
the VeOmni paper (arXiv:2508.02317) and COMET (arXiv:2502.19811).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    """How a module's tokens reach experts on the other ranks of ``group``: in ``chunks``, sent one behind the other.

    ``fixed_size`` buffers have the largest size that could be needed, so that the host reads nothing from the device;
    they cost up to P times the memory of the rows. ``shared`` experts of the same block, if any, run while the first
    tokens are in flight.
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
    """Return the weighted sum over the experts of ``[tokens, hidden]``, wherever they are.

    The choice, int64, and its weights are ``[tokens, k]``, among ``num_experts`` on all ranks; ``run`` runs this one's.
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
        group = exchange.group
        parts = zip(hidden.chunk(exchange.chunks), top_k_index.chunk(exchange.chunks), strict=True)
        self.chunks = [_Chunk(tokens, index, num_experts, group) for tokens, index in parts]
        # Rows for each expert of each rank, and from each rank for each of this one's: [chunks, P, local_experts].
        counts = torch.stack([chunk.routing.counts for chunk in self.chunks]).unflatten(1, (group.size(), -1))
        received = all_to_all(counts.transpose(0, 1).contiguous(), None, group).transpose(0, 1)
        (_fix_sizes if exchange.fixed_size else _fit_sizes)(self.chunks, counts.sum(2), received)
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


class _Chunk:
    """A chunk of tokens ``[tokens, hidden]`` for experts ``[tokens, k]``: dispatched, run, combined."""

    exchange: AsyncAllToAll

    def __init__(self, tokens: Tensor, index: Tensor, num_experts: int, group: ProcessGroup) -> None:
        self.tokens, self.index, self.group = tokens, index, group
        self.routing: Routing = route(index, num_experts)

    def lay_out(
        self, arriving: Tensor, experts: Tensor, splits: Splits | None = None, slots: Tensor | None = None,
        room: int = 0,
    ) -> None:  # fmt: skip
        """Set how the rows lie in the buffers that are exchanged.

        ``arriving`` are the rows from each rank for each local expert, ``[P, local_experts]``; ``experts`` the local
        expert of every one, ``local_experts`` where there is none. Without ``splits`` all buffers have one size,
        ``room``, and this rank's rows are at ``slots`` of the one that is sent; those behind it are not sent.
        """
        self.offsets, self.by_expert = arriving.sum(0).cumsum(0).to(torch.int32), experts.argsort(stable=True)
        self.inverse = inverse_of(self.by_expert)
        self.splits, self.slots, self.room = splits, slots, room

    def dispatch(self) -> None:
        """Send the rows to the ranks of their experts; those of no expert, sorted last, stay."""
        rows = permute_tokens(self.tokens, self.routing)
        if self.slots is None:
            rows = rows.narrow(0, 0, sum(self.splits.sent if self.splits else ()))
        else:
            rows = rows.new_zeros(self.room + 1, rows.shape[1]).index_copy(0, self.slots, rows)[:-1]
        self.exchange = AsyncAllToAll.start(rows, self.splits, self.group)

    def run_experts(self, run: RunExperts) -> None:
        """Run this rank's experts on the rows received and send the results back."""
        rows = gather_rows(self.exchange.wait(), self.by_expert, self.inverse)
        results = gather_rows(run(rows, self.offsets), self.inverse, self.by_expert)
        self.exchange = AsyncAllToAll.start(results, self.splits and self.splits.back(), self.group)

    def combine(self, weights: Tensor) -> Tensor:
        """Return each token's sum, weighted by ``[tokens, k]``; results of no expert are zeros."""
        results = self.exchange.wait()
        if self.slots is not None:
            results = F.pad(results, (0, 0, 0, 1)).index_select(0, self.slots)
        elif len(results) < self.index.numel():
            results = F.pad(results, (0, 0, 0, self.index.numel() - len(results)))
        return combine_rows(results, self.routing, weights)


def _fit_sizes(chunks: Sequence[_Chunk], sent: Tensor, received: Tensor) -> None:
    """Exchange exactly the rows there are. Their sizes are read by the host, for all chunks at once."""
    sizes = zip(*torch.stack([sent, received.sum(2)]).tolist(), strict=True)
    for chunk, arriving, (to_ranks, from_ranks) in zip(chunks, received, sizes, strict=True):
        ranks, local = arriving.shape
        experts = torch.arange(local, device=arriving.device).repeat(ranks)
        experts = experts.repeat_interleave(arriving.flatten(), output_size=sum(from_ranks))
        chunk.lay_out(arriving, experts, Splits(to_ranks, from_ranks))


def _fix_sizes(chunks: Sequence[_Chunk], sent: Tensor, received: Tensor) -> None:
    """Exchange as many rows as a rank could get; those that are not there sort behind all experts."""
    _, ranks, local = received.shape
    for chunk, to_ranks, arriving in zip(chunks, sent, received, strict=True):
        tokens, top_k = chunk.index.shape
        room = tokens * min(top_k, local)
        places = torch.arange(room, device=sent.device).expand(ranks, room).contiguous()
        experts = torch.searchsorted(arriving.cumsum(1), places, right=True)
        row, ends = torch.arange(tokens * top_k, device=sent.device), to_ranks.cumsum(0)
        rank_of_row = torch.searchsorted(ends, row, right=True)
        starts = F.pad(ends, (1, 0))  # the last: of rows that go nowhere
        slots = (rank_of_row * room + row - starts[rank_of_row]).clamp(max=ranks * room)
        chunk.lay_out(arriving, experts.flatten(), None, slots, ranks * room)
