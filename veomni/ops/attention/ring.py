"""Attention on a ring of C ranks: each keeps its queries, and receives the keys and values of one rank after the other.

Outputs over them add up (Liu et al., 2023, arXiv:2310.01889): heads need not divide, and no rank holds a whole row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from veomni.batch.fields import scope_of
from veomni.batch.split import zigzag_chunks
from veomni.errors import LayoutError, ModelError
from veomni.models.transformers_api.masks import is_plain_causal
from veomni.ops.attention.block import Block, attend, attend_backward, merge_into
from veomni.ops.attention.varlen import in_autocast_dtype
from veomni.ops.attention.whole_rows import SEQUENCE_GROUPS, group_of, register_whole_rows
from veomni.ops.comm.all_to_all import RingStep
from veomni.parallel.wrappers import wide_dtype

RING = "ring"
MASK_RULE = "mask_rule"


def _unsupported(problem: str) -> ModelError:
    return ModelError(problem, "use Ulysses instead of ContextParallel", "ContextParallel.size Ulysses.size")


@dataclass(frozen=True)
class MaskRule:
    """Which positions of a row see which, for any part of the row.

    ``mask_function`` is transformers': from indices of batch, head, query and key that broadcast, positions of the
    whole row among them, to where a query sees a key. ``causal`` is that no query sees a key after itself, and
    ``plain_causal`` that it sees all others.
    """

    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    batch: int
    plain_causal: bool
    causal: bool

    def visible(self, q_positions: Tensor, kv_positions: Tensor) -> Tensor:
        """Return where positions ``[q]`` see positions ``[kv]``, bool ``[batch, 1, q, kv]``."""
        rows = torch.arange(self.batch, device=q_positions.device)[:, None, None, None]
        head = rows.new_zeros(1, 1, 1, 1)
        seen = self.mask_function(rows, head, q_positions[None, None, :, None], kv_positions[None, None, None, :])
        return seen.expand(self.batch, 1, len(q_positions), len(kv_positions))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, rule: MaskRule, *, group: ProcessGroup, scale: float
) -> Tensor:
    """Attend over whole rows, of which each rank of the ring holds two chunks of the same length (``zigzag_chunks``).

    Under a causal rule early positions see little and late ones much: with one of each, every rank computes alike.
    Query, key and value are those of a :class:`Block` of ``seq / C`` positions; the result is ``[batch, heads, seq / C,
    value_head_dim]`` in the format of ``query``. A position that sees nothing gets zeros. Other chunks: LayoutError.
    """
    if query.shape[2] % 2 or key.shape[2] != query.shape[2]:
        problem = f"a rank of the ring holds {query.shape[2]} queries and {key.shape[2]} keys of each row"
        raise LayoutError(problem, "give every rank two chunks of each row, and its queries and keys the same ones")
    result: Tensor = _RingAttention.apply(query, key, value, _Ring(rule, group, scale))
    return result


@dataclass(frozen=True)
class _Ring:
    """What forward and backward have in common."""

    rule: MaskRule
    group: ProcessGroup
    scale: float

    def rounds(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Iterator[tuple[slice, slice, Block]]]:
        """Yield the blocks of each rank's keys and values, this one's first; meanwhile those of the next come in."""
        size, rank = self.group.size(), self.group.rank()
        for step in range(size):
            coming = RingStep((key, value), self.group) if step + 1 < size else None
            yield self._blocks((rank - step) % size, query, key, value)
            if coming is not None:
                key, value = coming.wait()

    def _blocks(self, source: int, query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[slice, slice, Block]]:
        """Yield halves of this rank's queries, halves of rank ``source``'s keys that they see, and both as a block."""
        size, width, rule = self.group.size(), query.shape[2] // 2, self.rule
        positions = torch.arange(2 * size * width, device=query.device).view(-1, width)
        halves = slice(width), slice(width, None)
        for queries, q_chunk in zip(halves, zigzag_chunks(size, self.group.rank()), strict=True):
            for keys, kv_chunk in zip(halves, zigzag_chunks(size, source), strict=True):
                if rule.causal and kv_chunk > q_chunk:
                    continue
                mask = None if rule.plain_causal else rule.visible(positions[q_chunk], positions[kv_chunk])
                causal = rule.plain_causal and kv_chunk == q_chunk
                parts = query[:, :, queries], key[:, :, keys], value[:, :, keys]
                yield queries, keys, Block(*parts, self.scale, causal, mask)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: _Ring) -> Tensor:
        dtype = wide_dtype(query.dtype)
        output = query.new_zeros(*query.shape[:3], value.shape[-1], dtype=dtype)
        lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
        with torch.autocast(query.device.type, enabled=False):
            for blocks in ring.rounds(query, key, value):
                for queries, _, block in blocks:
                    merge_into(output[:, :, queries], lse[:, :, queries], *attend(block))
        output = output.to(query.dtype)
        ctx.ring = ring
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return *_backward(ctx.ring, grads[0], *ctx.saved_tensors), None


def _backward(
    ring: _Ring, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of this rank's queries, keys and values.

    The gradients of keys and values are sent one step behind them, so that they too are in flight while the next block
    is computed, and one step further: from the last rank that adds to them to their own.
    """
    dtype = wide_dtype(query.dtype)
    grad_query = torch.zeros_like(query, dtype=dtype)
    behind: RingStep | None = None
    for blocks in ring.rounds(query, key, value):
        totals = [torch.zeros_like(part, dtype=dtype) for part in (key, value)]
        for queries, keys, block in blocks:
            own, *parts = attend_backward(block, grad[:, :, queries], output[:, :, queries], lse[:, :, queries])
            grad_query[:, :, queries] += own
            for total, part in zip(totals, parts, strict=True):
                total[:, :, keys] += part
        if behind is not None:
            for total, so_far in zip(totals, behind.wait(), strict=True):
                total += so_far
        behind = RingStep(totals, ring.group)
    assert behind is not None  # there is a rank
    grad_key, grad_value = behind.wait()
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def attend_on_ring(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: MaskRule | Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend over whole rows, on the ring of the module; see ``AttentionBackend.function``.

    The mask is the rule that the maker registered beside this made: windows and document boundaries are in it.
    Dropout in training, sinks and soft caps are a ModelError.
    """
    if not isinstance(attention_mask, MaskRule):
        given = "no mask rule" if attention_mask is None else "a mask of the model's own"
        raise _unsupported(f"{type(module).__name__} gives ring attention {given}")
    if dropout and module.training:
        raise _unsupported(f"ring attention has no dropout (the model has {dropout})")
    for name, option in kwargs.items():
        unknown = isinstance(option, Tensor) and scope_of(name) not in ("token", "row")
        if unknown or (name in ("s_aux", "sinks", "softcap") and option is not None):
            raise _unsupported(f"ring attention does not support {name}, which this model uses")
    query, key, value = in_autocast_dtype(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    group = group_of("ring", getattr(module, SEQUENCE_GROUPS, None))
    output = ring_attention(query, key, value, attention_mask, group=group, scale=scale)
    return output.transpose(1, 2).contiguous(), None


def register_ring() -> str:
    """Make ring attention known to transformers, mask makers included, and return its name."""
    register_mask_rule()
    return register_whole_rows(RING, "ring", attend_on_ring, _make_whole_row_rule)


def register_mask_rule() -> None:
    """Make the maker of rules for whole rows known to transformers, unless it is, perhaps with something around it."""
    from transformers import AttentionMaskInterface

    if MASK_RULE not in AttentionMaskInterface():
        AttentionMaskInterface.register(MASK_RULE, _make_mask_rule)


def _make_mask_rule(
    *, batch_size: int, mask_function: Callable[..., Tensor], causal: bool = False, **options: Any
) -> MaskRule:
    plain = is_plain_causal(mask_function)
    return MaskRule(mask_function, batch_size, plain_causal=plain, causal=plain or causal)


def _make_whole_row_rule(
    *, mask_function: Callable[..., Tensor], allow_is_causal_skip: bool = False, **options: Any
) -> MaskRule:
    from transformers import AttentionMaskInterface

    if options["q_length"] != options["kv_length"] or options.get("q_offset") or options.get("kv_offset"):
        raise _unsupported("ring attention was called for other keys than those of the current row")
    if options.get("use_vmap"):
        raise _unsupported("the model adds a rule to its mask that is defined on this rank's shard only")
    # SDPA may put is_causal in place of the mask when this is set, so transformers sets it for causal rules only;
    # a window or chunk reaches SDPA in another way.
    causal = allow_is_causal_skip or is_plain_causal(mask_function)
    maker: Callable[..., MaskRule] = AttentionMaskInterface()[MASK_RULE]
    return maker(mask_function=mask_function, causal=causal, **options)
