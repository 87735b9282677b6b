"""Tokens to rows sorted by expert, and back: sums in float32 or better and a fixed order; the host reads nothing."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from veomni.parallel.wrappers import wide_dtype


class Routing(NamedTuple):
    """Rows sorted by expert: the ``tokens * k`` pairs of token and expert, or rows that are given in that order.

    Attributes:
        offsets: Where each expert's rows end, int32 ``[experts]``.
        order: Of every sorted pair its place in the flattened choice, int64 ``[tokens * k]``, equal experts in order;
            None where the rows are given.
        inverse: Of every pair its place once sorted, int64 ``[tokens * k]``, or None.
        top_k: Pairs per token.
    """

    offsets: Tensor
    order: Tensor | None = None
    inverse: Tensor | None = None
    top_k: int = 1

    @property
    def counts(self) -> Tensor:
        """Rows of each expert, int64 ``[experts]``."""
        return self.offsets.diff(prepend=self.offsets.new_zeros(1)).to(torch.int64)


def route(top_k_index: Tensor, num_experts: int) -> Routing:
    """Return the pairs of ``top_k_index``, int64 ``[tokens, k]``, sorted by expert.

    A pair whose expert is ``num_experts`` means no expert (zaya skips experts so): it is sorted behind all others.
    """
    # Radix sort passes over the bits of its keys: narrow ones take a fraction of the time.
    narrow = torch.uint8 if num_experts < 256 else torch.int16 if num_experts < 32_768 else torch.int64
    experts, order = top_k_index.flatten().to(narrow).sort(stable=True)
    ids = torch.arange(num_experts, device=order.device, dtype=torch.int32)
    offsets = torch.searchsorted(experts.to(torch.int32), ids, right=True, out_int32=True)
    return Routing(offsets, order, inverse_of(order), top_k_index.shape[1])


def inverse_of(order: Tensor) -> Tensor:
    """Return the inverse of a permutation, int64."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def permute_tokens(hidden: Tensor, routing: Routing) -> Tensor:
    """Return ``[tokens * k, hidden]``: of every pair of ``routing`` its token of ``[tokens, hidden]``."""
    rows: Tensor = _Permute.apply(hidden, routing.order, routing.inverse, routing.top_k)
    return rows


def gather_rows(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Return ``rows[index]``, for a permutation and its inverse."""
    gathered: Tensor = _Permute.apply(rows, index, inverse, 1)
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


def combine_rows(rows: Tensor, routing: Routing, weights: Tensor) -> Tensor:
    """Return of every token the sum of its ``[tokens * k, hidden]`` rows, weighted by ``[tokens, k]``."""
    tokens: Tensor = _combine(rows, weights, routing.order, routing.inverse)
    return tokens


@torch.library.custom_op("veomni::combine_rows", mutates_args=())
def _combine(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return sum_of_rows(rows, inverse, weights.shape[1], weights)


@torch.library.custom_op("veomni::combine_rows_backward", mutates_args=())
def _combine_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    if has_kernels(rows):
        from veomni.ops.experts import permute_triton

        return permute_triton.sum_of_rows_backward(grad, rows, weights, order)
    wide = wide_dtype(rows.dtype)
    by_row = rows_of_tokens(grad, order, inverse, weights.shape[1]).to(wide)
    to_rows = (by_row * weights.flatten().index_select(0, order).to(wide)[:, None]).to(rows.dtype)
    to_weights = (by_row * rows.to(wide)).sum(1).index_select(0, inverse).view_as(weights).to(weights.dtype)
    return to_rows, to_weights


@_combine.register_fake
def _(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return rows.new_empty(weights.shape[0], rows.shape[1])


@_combine_backward.register_fake
def _(grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_combine_backward(grad.contiguous(), *ctx.saved_tensors), None, None


_combine.register_autograd(_differentiate, setup_context=_save)


# Below: without gradients.


def rows_of_tokens(hidden: Tensor, order: Tensor | None, inverse: Tensor | None, top_k: int) -> Tensor:
    """Return of every sorted pair its token, ``[tokens * k, hidden]``; ``hidden`` itself where it is rows."""
    if order is None or inverse is None:
        return hidden
    if has_kernels(hidden):
        from veomni.ops.experts import permute_triton

        return permute_triton.rows_of_tokens(hidden, inverse, top_k)
    return hidden.index_select(0, order // top_k if top_k > 1 else order)


def sum_of_rows(
    rows: Tensor, inverse: Tensor, top_k: int, weights: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """Return of every token the sum of its rows, ``[tokens, hidden]``, multiplied by ``weights`` ``[tokens, k]``.

    Rows past ``offsets[-1]`` count as zeros; without offsets all count.
    """
    if has_kernels(rows):
        from veomni.ops.experts import permute_triton

        return permute_triton.sum_of_rows(rows, inverse, top_k, weights, offsets)
    if offsets is not None:
        rows = rows.masked_fill(past_end(rows, offsets), 0)
    wide = wide_dtype(rows.dtype)
    by_token = rows.index_select(0, inverse).unflatten(0, (-1, top_k))
    if weights is None:
        return by_token.sum(1, dtype=wide).to(rows.dtype)
    return (by_token.to(wide) * weights.to(wide)[..., None]).sum(1).to(rows.dtype)


def zero_tail_(rows: Tensor, offsets: Tensor) -> Tensor:
    """Write zeros into the rows past ``offsets[-1]`` and return ``rows``."""
    if has_kernels(rows):
        from veomni.ops.experts import permute_triton

        return permute_triton.zero_tail_(rows, offsets)
    return rows.masked_fill_(past_end(rows, offsets), 0)


def past_end(rows: Tensor, offsets: Tensor) -> Tensor:
    """Return which rows have no expert, bool ``[rows, 1]``."""
    return (torch.arange(rows.shape[0], device=rows.device) >= offsets[-1])[:, None]


def expert_of_row(rows: Tensor, offsets: Tensor) -> Tensor:
    """Return the expert of every row, int64 ``[rows]``; the last one for rows that have none."""
    places = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, places, right=True).clamp(max=offsets.shape[0] - 1)


def has_kernels(rows: Tensor) -> bool:
    """Whether the kernels in Triton run on these rows: they add up in float32."""
    return rows.is_cuda and rows.dtype is not torch.float64
