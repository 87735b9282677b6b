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
    tokens: Tensor = _Combine.apply(rows, weights, routing.order, routing.inverse)
    return tokens


def gather_rows(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Return ``rows[index]``, where ``index`` is a permutation and ``inverse`` its inverse."""
    gathered: Tensor = _Gather.apply(rows, index, inverse)
    return gathered


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return rows_of_tokens(hidden, order, inverse, top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return sum_of_rows(grads[0].contiguous(), inverse, ctx.top_k), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, order, inverse)
        return sum_of_rows(rows, inverse, weights.shape[1], weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, order, inverse = ctx.saved_tensors
        to_rows, to_weights = sum_of_rows_backward(grads[0].contiguous(), rows, weights, order, inverse)
        return to_rows, to_weights, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return rows_of_tokens(rows, index, inverse, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        index, inverse = ctx.saved_tensors
        return rows_of_tokens(grads[0].contiguous(), inverse, index, 1), None, None


# ---------------------------------------------------------------- without gradients


def rows_of_tokens(hidden: Tensor, order: Tensor, inverse: Tensor, top_k: int, *, again: bool = False) -> Tensor:
    """Return of every sorted pair its token, ``[tokens * k, hidden]``; has no gradient.

    Args:
        hidden: ``[tokens, hidden]``.
        order: Places of the sorted pairs, int64 ``[tokens * k]``.
        inverse: Where each pair is once sorted, int64 ``[tokens * k]``.
        top_k: Pairs per token.
        again: Whether the same rows were made before and given up. A compiler that saw the same call twice would keep
            the rows of the forward for the backward.
    """
    if _has_kernels(hidden):
        from veomni.ops.experts import permute_triton

        return permute_triton.rows_of_tokens(hidden, inverse, top_k, again)
    return hidden.index_select(0, order // top_k if top_k > 1 else order)


def sum_of_rows(
    rows: Tensor, inverse: Tensor, top_k: int, weights: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """Return of every token the sum of its rows, ``[tokens, hidden]``; has no gradient.

    Args:
        rows: ``[tokens * k, hidden]``, sorted by expert.
        inverse: Where each pair is once sorted, int64 ``[tokens * k]``.
        top_k: Pairs per token.
        weights: Factors, ``[tokens, k]``, or None for ones.
        offsets: Where each expert's rows end, int32 ``[experts]``: rows past the last end count as zeros. None where
            all rows count.
    """
    if _has_kernels(rows):
        from veomni.ops.experts import permute_triton

        return permute_triton.sum_of_rows(rows, inverse, top_k, weights, offsets)
    if offsets is not None:
        rows = rows.masked_fill(past_end(rows, offsets), 0)
    wide = torch.promote_types(rows.dtype, torch.float32)
    by_token = rows.index_select(0, inverse).unflatten(0, (-1, top_k))
    if weights is None:
        return by_token.sum(1, dtype=wide).to(rows.dtype)
    return (by_token.to(wide) * weights.to(wide)[..., None]).sum(1).to(rows.dtype)


def sum_of_rows_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows and weights of :func:`sum_of_rows`.

    Args:
        grad: Gradient of the sums, ``[tokens, hidden]``.
        rows: ``[tokens * k, hidden]``, sorted by expert.
        weights: ``[tokens, k]``.
        order: Places of the sorted pairs, int64 ``[tokens * k]``.
        inverse: Where each pair is once sorted, int64 ``[tokens * k]``.
    """
    if _has_kernels(rows):
        from veomni.ops.experts import permute_triton

        to_rows, to_weights = permute_triton.sum_of_rows_backward(grad, rows, weights, order)
        return to_rows, to_weights
    wide = torch.promote_types(rows.dtype, torch.float32)
    by_row = rows_of_tokens(grad, order, inverse, weights.shape[1]).to(wide)
    to_rows = (by_row * weights.flatten().index_select(0, order).to(wide)[:, None]).to(rows.dtype)
    to_weights = (by_row * rows.to(wide)).sum(1).index_select(0, inverse).view_as(weights).to(weights.dtype)
    return to_rows, to_weights


def zero_tail_(rows: Tensor, offsets: Tensor) -> Tensor:
    """Write zeros into the rows past ``offsets[-1]`` and return ``rows``; has no gradient."""
    if _has_kernels(rows):
        from veomni.ops.experts import permute_triton

        permute_triton.zero_tail_(rows, offsets)
        return rows
    return rows.masked_fill_(past_end(rows, offsets), 0)


def past_end(rows: Tensor, offsets: Tensor) -> Tensor:
    """Return which rows have no expert, bool ``[rows, 1]``."""
    return (torch.arange(rows.shape[0], device=rows.device) >= offsets[-1])[:, None]


def _has_kernels(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype is not torch.float64  # the kernels add up in float32
