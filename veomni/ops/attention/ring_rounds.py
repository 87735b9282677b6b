"""The rounds of ring attention: queries attend to the keys of one rank after the other, while the next are received."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from veomni.batch.split import zigzag_chunks
from veomni.ops.attention.block import Block, Segments, attend, attend_backward, merge_into
from veomni.ops.attention.row_rules import CausalRule, MaskRule, Rule
from veomni.ops.comm.all_to_all import RingStep
from veomni.parallel.wrappers import wide_dtype

Part = tuple[slice, slice, Block]


@dataclass(frozen=True)
class Ring:
    """A ring of ranks and the rule of its rows: what forward and backward have in common."""

    rule: Rule
    group: ProcessGroup
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output in the format of ``query`` and the lse, over all keys."""
        dtype = wide_dtype(query.dtype)
        output = output_like(query, value, dtype).zero_()
        lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
        with torch.autocast(query.device.type, enabled=False):
            for parts in self._rounds(query, key, value):
                for queries, _, block in parts:
                    merge_into(output[:, :, queries], lse[:, :, queries], *attend(block))
        return output.to(query.dtype), lse

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of this rank's queries, keys and values.

        The gradients of keys and values are sent one step behind them, so that they too are in flight while the next
        block is computed, and one step further: from the last rank that adds to them to their own.
        """
        dtype = wide_dtype(query.dtype)
        grad = torch.empty_like(output).copy_(grad)  # cuDNN takes it laid out as the output is
        grad_query = torch.zeros_like(query, dtype=dtype)
        behind: RingStep | None = None
        with torch.autocast(grad.device.type, enabled=False):
            for parts in self._rounds(query, key, value):
                totals = [torch.zeros_like(part, dtype=dtype) for part in (key, value)]
                for queries, keys, block in parts:
                    own, *others = attend_backward(
                        block, grad[:, :, queries], output[:, :, queries], lse[:, :, queries]
                    )
                    grad_query[:, :, queries] += own
                    for total, other in zip(totals, others, strict=True):
                        total[:, :, keys] += other
                if behind is not None:
                    for total, so_far in zip(totals, behind.wait(), strict=True):
                        total += so_far
                behind = RingStep(totals, self.group)
        assert behind is not None  # there is a rank
        # They are received in one buffer, and an operation returns tensors of their own.
        grad_key, grad_value = (part.to(key.dtype, copy=True) for part in behind.wait())
        return grad_query.to(query.dtype), grad_key, grad_value

    def _rounds(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Iterator[Part]]:
        """Yield the parts of each rank's keys and values, this one's first; meanwhile those of the next come in."""
        size, rank = self.group.size(), self.group.rank()
        for step in range(size):
            coming = RingStep((key, value), self.group) if step + 1 < size else None
            yield self._parts((rank - step) % size, query, key, value)
            if coming is not None:
                key, value = coming.wait()

    def _parts(self, source: int, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Part]:
        """Yield some of this rank's queries, some of rank ``source``'s keys that they see, and both as a block."""
        if isinstance(self.rule, MaskRule) or self.rule.window:
            return self._pairs(source, query, key, value)
        return self._whole(self.rule, source, query, key, value)

    def _whole(self, rule: CausalRule, source: int, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Part]:
        """Yield all as one block: chunks of one rank lie in order, and a chunk of another is seen whole or not at all.

        All queries see the first chunk of an earlier rank, and the second ones both chunks of a later rank.
        """
        size, rank, width = self.group.size(), self.group.rank(), query.shape[2] // 2
        queries = slice(width, None) if source > rank else slice(None)
        keys = slice(width) if source < rank else slice(None)
        segments = None
        if rule.boundaries is not None:
            first, second = zigzag_chunks(size, rank)
            q_chunks = [second] if source > rank else [first, second]
            kv_chunks = zigzag_chunks(size, source)[: 1 if source < rank else 2]
            segments = Segments(rule.segments(q_chunks, width), rule.segments(kv_chunks, width), rule.longest)
        parts = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        yield queries, keys, Block(*parts, self.scale, source == rank, segments=segments)

    def _pairs(self, source: int, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Part]:
        """Yield every pair of chunks that see each other, with a mask."""
        size, width = self.group.size(), query.shape[2] // 2
        positions = torch.arange(2 * size * width, device=query.device).view(-1, width)
        halves = slice(width), slice(width, None)
        for queries, q_chunk in zip(halves, zigzag_chunks(size, self.group.rank()), strict=True):
            for keys, kv_chunk in zip(halves, zigzag_chunks(size, source), strict=True):
                if self.rule.reaches(q_chunk, kv_chunk, width):
                    mask = self.rule.visible(positions[q_chunk], positions[kv_chunk])
                    parts = query[:, :, queries], key[:, :, keys], value[:, :, keys]
                    yield queries, keys, Block(*parts, self.scale, mask=mask)


def output_like(query: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return room for ``[batch, heads, q, value_head_dim]``, laid out as projections read it: heads after positions."""
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1], dtype=dtype).transpose(1, 2)
