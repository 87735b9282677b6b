"""Attention on a ring of C ranks: each keeps its queries, and receives the keys and values of one rank after the other.

Outputs over them add up (Liu et al., 2023, arXiv:2310.01889): heads need not divide, and no rank holds a whole row.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from veomni.batch.fields import scope_of
from veomni.compat.collectives import group_named
from veomni.errors import LayoutError
from veomni.ops.attention.ring_rounds import Ring, output_like
from veomni.ops.attention.row_rules import CausalRule, MaskRule, Rule, make_row_rule, register_mask_rule, unsupported
from veomni.ops.attention.varlen import in_autocast_dtype
from veomni.ops.attention.whole_rows import SEQUENCE_GROUPS, group_of, register_whole_rows
from veomni.parallel.wrappers import wide_dtype

RING = "ring"


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, *, group: ProcessGroup, scale: float
) -> Tensor:
    """Attend over whole rows, of which each rank of the ring holds two chunks of the same length (``zigzag_chunks``).

    Under a causal rule early positions see little and late ones much: with one of each, every rank computes alike.
    Query, key and value are those of a :class:`Block` of ``seq / C`` positions; the result is ``[batch, heads, seq / C,
    value_head_dim]`` in the format of ``query``. A position that sees nothing gets zeros. Other chunks: LayoutError.
    """
    if query.shape[2] % 2 or key.shape[2] != query.shape[2]:
        problem = f"a rank of the ring holds {query.shape[2]} queries and {key.shape[2]} keys of each row"
        raise LayoutError(problem, "give every rank two chunks of each row, and its queries and keys the same ones")
    if isinstance(rule, MaskRule):
        return _by_function(query, key, value, Ring(rule, group, scale))
    options = rule.boundaries, rule.longest, rule.window, group.group_name, scale
    output: Tensor = _attend(query, key, value, *options)[0]
    return output


# One operation, so that a compiled block stays in one graph; what it takes of a rule and a group is data.


@torch.library.custom_op("veomni::ring_attention", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor | None, longest: int, window: int, group: str,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _ring(query, boundaries, longest, window, group, scale).forward(query, key, value)


@_attend.register_fake
def _attended(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=wide_dtype(query.dtype))
    return output_like(query, value, query.dtype), lse


@torch.library.custom_op("veomni::ring_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, heads: list[Tensor], boundaries: Tensor | None, longest: int, window: int, group: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _ring(heads[0], boundaries, longest, window, group, scale).backward(grad, *heads)


@_attend_backward.register_fake
def _gradients(grad: Tensor, heads: list[Tensor], *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, *_ = heads
    return torch.empty_like(query), key.new_empty(key.shape), value.new_empty(value.shape)


def _ring(query: Tensor, boundaries: Tensor | None, longest: int, window: int, group: str, scale: float) -> Ring:
    ranks = group_named(group)
    rule = CausalRule(len(query), query.shape[2] * ranks.size(), boundaries, longest, window)
    return Ring(rule, ranks, scale)


def _set_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, boundaries, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, *output, boundaries)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *heads, boundaries = ctx.saved_tensors
    return *_attend_backward(grad, heads, boundaries, *ctx.options), *[None] * 5


_attend.register_autograd(_backward, setup_context=_set_context)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_function(query: Tensor, key: Tensor, value: Tensor, ring: Ring) -> Tensor:
    """Attend by a rule that an operation cannot take; a compiled block breaks here."""
    output: Tensor = _ByFunction.apply(query, key, value, ring)
    return output


class _ByFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: Ring) -> Tensor:
        output, lse = ring.forward(query, key, value)
        ctx.ring = ring
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.ring.backward(grads[0], *ctx.saved_tensors), None


def attend_on_ring(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Rule | Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend over whole rows, on the ring of the module; see ``AttentionBackend.function``.

    The mask is the rule that the maker registered beside this made: windows and document boundaries are in it.
    Dropout in training, sinks and soft caps are a ModelError.
    """
    if not isinstance(attention_mask, (MaskRule, CausalRule)):
        given = "no mask rule" if attention_mask is None else "a mask of the model's own"
        raise unsupported(f"{type(module).__name__} gives ring attention {given}")
    if dropout and module.training:
        raise unsupported(f"ring attention has no dropout (the model has {dropout})")
    for name, option in kwargs.items():
        unknown = isinstance(option, Tensor) and scope_of(name) not in ("token", "row")
        if unknown or (name in ("s_aux", "sinks", "softcap") and option is not None):
            raise unsupported(f"ring attention does not support {name}, which this model uses")
    query, key, value = in_autocast_dtype(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    group = group_of("ring", getattr(module, SEQUENCE_GROUPS, None))
    output = ring_attention(query, key, value, attention_mask, group=group, scale=scale)
    return output.transpose(1, 2).contiguous(), None


def register_ring() -> str:
    """Make ring attention known to transformers, mask makers included, and return its name."""
    register_mask_rule()
    return register_whole_rows(RING, "ring", attend_on_ring, make_row_rule)
