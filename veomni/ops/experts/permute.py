"""Tokens to rows sorted by expert, and rows back to tokens; sums are taken in float32 or better, in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veomni.ops.experts.routing import Routing


def permute_tokens(hidden: Tensor, routing: Routing, top_k: int) -> Tensor:
    """Return ``[tokens * k, hidden]``: a row for every pair of token and expert, sorted by expert.

    Args:
        hidden: ``[tokens, hidden]``.
        routing: The sorted pairs.
        top_k: Experts per token.
    """
    rows: Tensor = _Permute.apply(hidden, routing.order, routing.inverse, top_k)
    return rows


def combine_rows(rows: Tensor, routing: Routing, weights: Tensor) -> Tensor:
    """Return ``[tokens, hidden]``: of every token the sum of its rows, weighted.

    Args:
        rows: ``[tokens * k, hidden]``, sorted by expert.
        routing: The sorted pairs.
        weights: ``[tokens, k]``.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    by_token = gather_rows(rows, routing.inverse, routing.order).unflatten(0, weights.shape)
    return (by_token.to(wide) * weights.to(wide)[..., None]).sum(1).to(rows.dtype)


def gather_rows(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Return ``rows[index]``, where ``index`` is a permutation and ``inverse`` its inverse."""
    gathered: Tensor = _Gather.apply(rows, index, inverse)
    return gathered


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return hidden.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        by_token = grads[0].index_select(0, inverse).unflatten(0, (-1, ctx.top_k))
        wide = torch.promote_types(by_token.dtype, torch.float32)
        return by_token.sum(1, dtype=wide).to(by_token.dtype), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None
