"""Expert parallelism: each token is sent once to every rank that holds some of its experts; no token is dropped.

A rank computes the weighted sum over its own experts, as a layer on one rank does, and sends it back. With several
chunks, the tokens of one chunk are in flight while the experts run on another; the backward mirrors it, as in the
VeOmni paper (arXiv:2508.02317) and COMET (arXiv:2502.19811).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from veomni.ops.comm.all_to_all import AsyncAllToAll, Splits, all_to_all
from veomni.ops.experts.permute import Routing, gather_tokens, permute_tokens, route, sum_tokens
from veomni.ops.experts.shared import SharedExperts
from veomni.ops.host_copy import HostCopy

RunExperts = Callable[[Tensor, Routing, Tensor, Tensor], Tensor]
"""Tokens ``[tokens, hidden]``, the routing of their expert indices, these indices and their weights, both
``[tokens, k]``, to the weighted sums ``[tokens, hidden]``."""

EXCHANGE = "expert_exchange"
"""The attribute of a module with a shard of the experts that holds its :class:`ExpertExchange`."""


@dataclass(frozen=True)
class ExpertExchange:
    """How a module's tokens reach experts on the other ranks of ``group``.

    Attributes:
        group: The ranks that share the experts of a layer.
        chunks: Chunks of the tokens, sent one after another.
        fixed_size: Send every token to every rank, so that the host reads nothing from the device; all ranks must have
            equally many tokens.
        shared: Shared experts of the same block, if any, which run while the first tokens are in flight.
    """

    group: ProcessGroup
    chunks: int = 1
    fixed_size: bool = False
    shared: SharedExperts | None = None


# A graph that holds a process group, or sizes that depend on the data, cannot be compiled.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def exchange_experts(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, local_experts: int, run: RunExperts,
    exchange: ExpertExchange,
) -> Tensor:  # fmt: skip
    """Return each token's weighted sum over its experts on all ranks, ``[tokens, hidden]``.

    The expert indices, int64, and their weights are ``[tokens, k]``; each rank holds ``local_experts``, which ``run``
    runs.
    """
    shared = exchange.shared
    dispatch = shared.take_dispatch(hidden, top_k_index) if shared is not None else None
    if dispatch is None:
        dispatch = Dispatch(hidden, top_k_index, local_experts, exchange)
        if shared is not None:
            shared.run_ahead(hidden)
    return dispatch.combine(top_k_weights, run)


class Dispatch:
    """Tokens sent to the ranks of their experts chunk by chunk; the first chunk is in flight."""

    def __init__(self, hidden: Tensor, top_k_index: Tensor, local_experts: int, exchange: ExpertExchange) -> None:
        parts = zip(*(_split(each, exchange.chunks) for each in (hidden, top_k_index)), strict=True)
        self.chunks = [_Chunk(tokens, index, local_experts, exchange) for tokens, index in parts]
        sizes = None if exchange.fixed_size else _sizes(self.chunks, exchange.group)
        self.chunks[0].pack()  # by the device, while the host waits for the sizes
        if sizes is not None:
            self._fit(sizes)
        self.chunks[0].dispatch()

    def _fit(self, sizes: HostCopy) -> None:
        for chunk, ((to_ranks, _), (from_ranks, pairs)) in zip(self.chunks, sizes.read().tolist(), strict=True):
            chunk.fit(Splits(to_ranks, from_ranks), sum(pairs))

    def combine(self, weights: Tensor, run: RunExperts) -> Tensor:
        """Run the experts and return each token's weighted sum, ``[tokens, hidden]``."""
        # Of all chunks before the next chunk's tokens are sent: the experts of this chunk need not wait for those.
        for chunk, share in zip(self.chunks, _split(weights, len(self.chunks)), strict=True):
            chunk.send_weights(share)
        results: list[Tensor] = []
        for index, chunk in enumerate(self.chunks):
            if index + 1 < len(self.chunks):
                self.chunks[index + 1].dispatch()
            chunk.run_experts(run)
            if index:
                results.append(self.chunks[index - 1].combine())
        results.append(self.chunks[-1].combine())
        return torch.cat(results) if len(results) > 1 else results[0]

    def cancel(self) -> None:
        """Wait for the chunk in flight and discard it."""
        self.chunks[0].cancel()


class _Chunk:
    """A chunk of tokens ``[tokens, hidden]`` for experts ``[tokens, k]``: dispatched, run, combined.

    Attributes:
        routing: The rows that are sent, sorted by rank: one for each rank that a token goes to.
        splits: The rows to each rank and from each; None where all tokens go to all ranks.
        pairs: Pairs of a received token and an expert of this rank, or the most there can be.
    """

    _packed: tuple[Tensor, Tensor] | None = None
    _choice: AsyncAllToAll
    _weights: AsyncAllToAll
    _tokens: AsyncAllToAll
    _results: AsyncAllToAll

    def __init__(self, tokens: Tensor, index: Tensor, local_experts: int, exchange: ExpertExchange) -> None:
        self.tokens, self.index, self.group, self.local_experts = tokens, index, exchange.group, local_experts
        ranks, count = exchange.group.size(), len(tokens)
        if exchange.fixed_size:
            chosen = torch.arange(ranks, device=index.device).expand(count, ranks)
        else:
            chosen = distinct_ranks(index // local_experts, ranks)
        self.routing = route(chosen, ranks).first(count * min(chosen.shape[1], ranks))
        self.splits: Splits | None = None
        self.pairs = count * ranks * min(index.shape[1], local_experts)

    def counts(self) -> Tensor:
        """Return the rows for each rank, and the pairs of a row and an expert there: ``[P, 2]``."""
        ranks = torch.arange(self.group.size(), device=self.index.device)
        pairs = (self.index[..., None] // self.local_experts == ranks).sum((0, 1))
        return torch.stack([self.routing.counts, pairs], 1)

    def fit(self, splits: Splits, pairs: int) -> None:
        """Set the exact sizes: ``splits`` of the rows, and ``pairs`` of a received token and a local expert."""
        self.splits, self.pairs = splits, pairs
        self.routing = self.routing.first(sum(splits.sent))

    def pack(self) -> tuple[Tensor, Tensor]:
        """Return the local expert indices of the rows to send, and the rows; a superset until :meth:`fit`."""
        self._packed = self._local_choice(), gather_tokens(self.tokens, self.routing)
        return self._packed

    def dispatch(self) -> None:
        """Send the local expert indices, then the tokens, to the ranks of the experts."""
        (choice, rows), count = self._packed or self.pack(), len(self.routing.order)
        self._packed = None
        self._choice = AsyncAllToAll.start(choice[:count], self.splits, self.group)
        tokens = permute_tokens(self.tokens, self.routing, rows[:count])
        self._tokens = AsyncAllToAll.start(tokens, self.splits, self.group)

    def _local_choice(self) -> Tensor:
        """Return for each row the indices of its experts on the receiving rank, ``local_experts`` for all others."""
        token, ends = self.routing.order // self.routing.top_k, self.routing.offsets
        rows = torch.arange(len(token), device=ends.device, dtype=ends.dtype)
        first = torch.searchsorted(ends, rows, right=True)[:, None] * self.local_experts
        local = self.index.index_select(0, token) - first
        return local.where((local >= 0) & (local < self.local_experts), self.local_experts).to(torch.int32)

    def send_weights(self, weights: Tensor) -> None:
        """Send the weights of each row, ``[rows, k]``; on a rank, weights of experts of other ranks get no gradient."""
        self._weights = AsyncAllToAll.start(permute_tokens(weights, self.routing), self.splits, self.group)

    def run_experts(self, run: RunExperts) -> None:
        """Run this rank's experts on the tokens received and send their sums back."""
        choice = self._choice.wait().long()
        received = route(choice, self.local_experts).first(self.pairs)
        results = run(self._tokens.wait(), received, choice, self._weights.wait())
        self._results = AsyncAllToAll.start(results, self.splits and self.splits.back(), self.group)

    def combine(self) -> Tensor:
        """Return each token's sum over the ranks, ``[tokens, hidden]``."""
        return sum_tokens(self._results.wait(), self.routing)

    def cancel(self) -> None:
        """Wait for what is in flight and discard it."""
        self._choice.wait()
        self._tokens.wait()


def _split(tokens: Tensor, chunks: int) -> Sequence[Tensor]:
    """Return ``chunks`` chunks, also of few tokens (some are empty): every rank takes part in each exchange."""
    even, more = divmod(len(tokens), chunks)
    return tokens.split([even + (chunk < more) for chunk in range(chunks)]) if chunks > 1 else [tokens]


def distinct_ranks(ranks: Tensor, size: int) -> Tensor:
    """Return the ranks of each token, ``[tokens, k]``, sorted, with ``size`` in place of repeated ones."""
    ranks, _ = ranks.sort(1)
    again = ranks[:, 1:] == ranks[:, :-1]
    return torch.cat([ranks[:, :1], ranks[:, 1:].masked_fill(again, size)], 1)


def ranks_of_token(experts: int, top_k: int, ranks: int, *, fixed: bool) -> float:
    """Return to how many of ``ranks`` a token is sent: all with ``fixed`` sizes, else those of its ``top_k`` experts.

    The latter is the mean over choices that are equally likely.
    """
    if fixed:
        return ranks
    return ranks * (1 - math.comb(experts - experts // ranks, top_k) / math.comb(experts, top_k))


def _sizes(chunks: Sequence[_Chunk], group: ProcessGroup) -> HostCopy:
    """Return the sizes of all chunks, ``[chunks, 2, 2, P]``: rows and pairs to each rank, and rows and pairs from each.

    The host reads nothing else of the exchange.
    """
    sent = torch.stack([chunk.counts() for chunk in chunks], 1)  # [P, chunks, 2]
    return HostCopy(torch.stack([sent, all_to_all(sent, None, group)]).permute(2, 0, 3, 1))
