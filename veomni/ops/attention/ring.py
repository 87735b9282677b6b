"""Attention over a sequence that is split over ranks: keys and values are sent round a ring of them.

Each rank keeps its queries. It receives the keys and values of one rank after the other, and adds up what the queries
see of them (Liu et al., 2023, arXiv:2310.01889). Nothing but attention sees that rows are split, heads need not divide,
and no rank ever holds a whole row.

A row is cut into ``2 * C`` chunks for the ``C`` ranks of the ring, and rank ``c`` holds chunks ``c`` and
``2 * C - 1 - c``: under a causal rule early positions see little and late ones much, and so every rank computes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from veomni.batch.fields import scope_of
from veomni.batch.forward_call import current_groups
from veomni.batch.split import zigzag_chunks
from veomni.errors import LayoutError, ModelError
from veomni.models.transformers_api.masks import is_plain_causal
from veomni.ops.attention.block import accumulation_dtype, attend, attend_backward, merge_into
from veomni.ops.attention.varlen import in_autocast_dtype
from veomni.ops.comm.ring import RingStep

RING = "ring"
MASK_RULE = "mask_rule"
_FIX = "use Ulysses instead of ContextParallel"


def _chunk(number: int, width: int, device: torch.device) -> Tensor:
    return torch.arange(number * width, (number + 1) * width, device=device)


@dataclass(frozen=True)
class MaskRule:
    """Which positions of a row see which, for any part of the row.

    Attributes:
        mask_function: transformers' convention: takes indices of batch, head, query and key that broadcast, positions
            of the whole row among them, and returns True where a query sees a key.
        batch: Rows.
        plain_causal: Whether it is exactly that a query sees the keys up to itself.
        causal: Whether no query sees a key after itself, also where more is hidden.
    """

    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    batch: int
    plain_causal: bool
    causal: bool

    def visible(self, q_positions: Tensor, kv_positions: Tensor) -> Tensor:
        """Return where positions ``[q]`` see positions ``[kv]``, bool ``[batch, 1, q, kv]``."""
        rows = torch.arange(self.batch, device=q_positions.device)
        seen = self.mask_function(
            rows[:, None, None, None],
            rows.new_zeros(1, 1, 1, 1),
            q_positions[None, None, :, None],
            kv_positions[None, None, None, :],
        )
        return seen.expand(self.batch, 1, len(q_positions), len(kv_positions))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, rule: MaskRule, *, group: ProcessGroup, scale: float
) -> Tensor:
    """Attend over whole rows, of which each rank of the ring holds two chunks (``zigzag_chunks``).

    Args:
        query: ``[batch, heads, seq / C, head_dim]``.
        key: ``[batch, kv_heads, seq / C, head_dim]``; ``kv_heads`` divides ``heads``.
        value: ``[batch, kv_heads, seq / C, value_head_dim]``.
        rule: What sees what.
        group: The ranks of the ring.
        scale: Factor on the scores.

    Returns:
        ``[batch, heads, seq / C, value_head_dim]`` in the format of ``query``. A position that sees nothing gets zeros.

    Raises:
        LayoutError: a rank's positions are not two chunks of the same length.
    """
    if query.shape[2] % 2 or key.shape[2] != query.shape[2]:
        raise LayoutError(
            f"a rank of the ring holds {query.shape[2]} queries and {key.shape[2]} keys of each row",
            "give every rank two chunks of each row, and its queries and keys the same ones",
        )
    result: Tensor = _RingAttention.apply(query, key, value, _Ring(rule, group, scale))
    return result


@dataclass(frozen=True)
class _Pair:
    """A half of this rank's queries, and a half of the current keys that it sees at least partly."""

    queries: slice
    keys: slice
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True)
class _Ring:
    """What forward and backward have in common."""

    rule: MaskRule
    group: ProcessGroup
    scale: float

    def sources(self) -> Iterator[int]:
        """Yield the rank whose keys and values are current at each step: this one, then those before it."""
        for step in range(self.group.size()):
            yield (self.group.rank() - step) % self.group.size()

    def pairs(self, source: int, local: int, device: torch.device) -> Iterator[_Pair]:
        """Return what to compute on the keys of rank ``source``; ``local`` positions are on each rank."""
        size, width = self.group.size(), local // 2
        for q_half, q_chunk in enumerate(zigzag_chunks(size, self.group.rank())):
            for kv_half, kv_chunk in enumerate(zigzag_chunks(size, source)):
                if self.rule.causal and kv_chunk > q_chunk:
                    continue
                mask = None
                if not self.rule.plain_causal:
                    mask = self.rule.visible(_chunk(q_chunk, width, device), _chunk(kv_chunk, width, device))
                yield _Pair(
                    slice(q_half * width, (q_half + 1) * width),
                    slice(kv_half * width, (kv_half + 1) * width),
                    mask,
                    causal=self.rule.plain_causal and kv_chunk == q_chunk,
                )

    def send(self, *tensors: Tensor) -> RingStep:
        return RingStep(tensors, self.group)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: _Ring) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            output, lse = _forward(ring, query, key, value)
        output = output.to(query.dtype)
        ctx.ring = ring
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return *_backward(ctx.ring, grads[0], *ctx.saved_tensors), None


def _forward(ring: _Ring, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return output ``[batch, heads, local, value_head_dim]`` and lse ``[batch, heads, local]``."""
    dtype = accumulation_dtype(query.dtype)
    output = query.new_zeros(*query.shape[:3], value.shape[-1], dtype=dtype)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
    last = (ring.group.rank() + 1) % ring.group.size()
    for source in ring.sources():
        coming = None if source == last else ring.send(key, value)
        for pair in ring.pairs(source, query.shape[2], query.device):
            queries, keys = pair.queries, pair.keys
            part, part_lse = attend(
                query[:, :, queries], key[:, :, keys], value[:, :, keys], pair.mask,
                causal=pair.causal, scale=ring.scale,
            )  # fmt: skip
            merge_into(output[:, :, queries], lse[:, :, queries], part, part_lse)
        if coming is not None:
            key, value = coming.wait()
    return output, lse


def _backward(
    ring: _Ring, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of this rank's queries, keys and values.

    The gradients of keys and values are sent one step behind them, so that they too are in flight while the next block
    is computed, and one step further: from the last rank that adds to them to their own.
    """
    key_dtype, value_dtype = key.dtype, value.dtype
    grad_query = torch.zeros_like(query, dtype=accumulation_dtype(query.dtype))
    last = (ring.group.rank() + 1) % ring.group.size()
    behind: RingStep | None = None
    for source in ring.sources():
        coming = None if source == last else ring.send(key, value)
        grad_key, grad_value = (torch.zeros_like(part, dtype=grad_query.dtype) for part in (key, value))
        for pair in ring.pairs(source, query.shape[2], query.device):
            queries, keys = pair.queries, pair.keys
            parts = attend_backward(
                grad[:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys], output[:, :, queries],
                lse[:, :, queries], pair.mask, causal=pair.causal, scale=ring.scale,
            )  # fmt: skip
            grad_query[:, :, queries] += parts[0]
            grad_key[:, :, keys] += parts[1]
            grad_value[:, :, keys] += parts[2]
        if behind is not None:
            for so_far, total in zip(behind.wait(), (grad_key, grad_value), strict=True):
                total += so_far
        behind = ring.send(grad_key, grad_value)
        if coming is not None:
            key, value = coming.wait()
    assert behind is not None
    grad_key, grad_value = behind.wait()
    return grad_query.to(query.dtype), grad_key.to(key_dtype), grad_value.to(value_dtype)


class RingAttention:
    """What transformers calls in place of an attention implementation; the ring is that of the current call."""

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: MaskRule | Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend over the whole sequence.

        Args:
            module: The attention module.
            query: ``[batch, heads, seq / C, head_dim]``.
            key: ``[batch, kv_heads, seq / C, head_dim]``.
            value: Like ``key``; its head_dim may differ.
            attention_mask: The rule that the maker registered beside this made.
            scaling: Factor on the scores; ``head_dim ** -0.5`` when None.
            dropout: Must be 0 in training.
            kwargs: What other backends take; windows and document boundaries are in the rule already.

        Returns:
            ``[batch, seq / C, heads, value_head_dim]`` and None in place of weights.

        Raises:
            ModelError: an option of the model is unsupported.
        """
        if not isinstance(attention_mask, MaskRule):
            given = "no mask rule" if attention_mask is None else "a mask of the model's own"
            raise ModelError(
                f"{type(module).__name__} gives ring attention {given}", _FIX, "ContextParallel.size Ulysses.size"
            )
        if dropout and module.training:
            raise ModelError(
                f"ring attention has no dropout (the model has {dropout})",
                _FIX,
                "ContextParallel.size Ulysses.size",
            )
        _check_options(kwargs)
        query, key, value = in_autocast_dtype(query, key, value)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = ring_attention(query, key, value, attention_mask, group=_ring_group(), scale=scale)
        return output.transpose(1, 2).contiguous(), None


def _check_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        unknown = isinstance(value, Tensor) and scope_of(name) not in ("token", "row")
        if unknown or (name in ("s_aux", "sinks", "softcap") and value is not None):
            raise ModelError(
                f"ring attention does not support {name}, which this model uses",
                _FIX,
                "ContextParallel.size Ulysses.size",
            )


def _ring_group() -> ProcessGroup:
    group = current_groups().ring
    assert group is not None, "ring attention was chosen for a model without a ring"
    return group


def register_ring() -> str:
    """Make ring attention known to transformers, mask makers included, and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    register_mask_rule()
    AttentionInterface.register(RING, RingAttention())
    AttentionMaskInterface.register(RING, make_whole_row_rule)
    return RING


def register_mask_rule() -> None:
    """Make the maker of rules for whole rows known to transformers, unless it is, perhaps with something around it."""
    from transformers import AttentionMaskInterface

    if MASK_RULE not in AttentionMaskInterface():
        AttentionMaskInterface.register(MASK_RULE, make_mask_rule)


def make_mask_rule(
    *, batch_size: int, mask_function: Callable[..., Tensor], causal: bool = False, **options: Any
) -> MaskRule:
    """Make the rule of whole rows, as one of transformers' mask makers.

    Args:
        batch_size: Rows.
        mask_function: transformers' rule.
        causal: Whether it is certain that no query sees a key after itself.
        options: What other makers take.
    """
    plain = is_plain_causal(mask_function)
    return MaskRule(mask_function, batch_size, plain_causal=plain, causal=plain or causal)


def make_whole_row_rule(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = False,
    **options: Any,
) -> MaskRule:
    """Make the rule of whole rows, as one of transformers' mask makers that is called for this rank's positions.

    Raises:
        ModelError: the model's mask is not a rule of whole rows.
    """
    from transformers import AttentionMaskInterface

    if attention_mask is not None:
        raise ModelError("ring attention was given a padding mask", "pack the documents and leave attention_mask out")
    if q_length != kv_length or q_offset or kv_offset:
        raise ModelError(
            "ring attention was called for other keys than those of the current row",
            _FIX,
            "ContextParallel.size Ulysses.size",
        )
    if use_vmap:
        raise ModelError(
            "the model adds a rule to its mask that is defined on this rank's shard only",
            _FIX,
            "ContextParallel.size Ulysses.size",
        )
    # SDPA may put is_causal in place of the mask when this is set, so transformers sets it for causal rules only;
    # a window or chunk reaches SDPA in another way.
    causal = allow_is_causal_skip or is_plain_causal(mask_function)
    whole = q_length * _ring_group().size()
    maker: Callable[..., MaskRule] = AttentionMaskInterface()[MASK_RULE]
    return maker(q_length=whole, kv_length=whole, mask_function=mask_function, causal=causal, **options)


__all__ = [
    "MASK_RULE", "RING", "MaskRule", "RingAttention", "make_mask_rule", "register_mask_rule", "register_ring",
    "ring_attention",
]  # fmt: skip
