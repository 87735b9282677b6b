"""Tokens to rows sorted by expert, and back: sums in float32 or better and a fixed order; the host reads nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from veomni.parallel.wrappers import wide_dtype


class Routing(NamedTuple):
    """Pairs of a token and one of its choices, sorted by expert (or by the rank a token goes to).

    Attributes:
        offsets: Where each expert's rows end, int32 ``[experts]``.
        order: The pair of each row, as an index into the flattened choices, int64 ``[rows]``; stable within an expert.
        inverse: The row of each pair, int64 ``[tokens * k]``; at least ``rows`` for a pair that has none.
        top_k: Pairs per token.
    """

    offsets: Tensor
    order: Tensor
    inverse: Tensor
    top_k: int

    @property
    def counts(self) -> Tensor:
        """Rows of each expert, int64 ``[experts]``."""
        return self.offsets.diff(prepend=self.offsets.new_zeros(1)).to(torch.int64)

    def first(self, rows: int) -> Routing:
        """Return a routing of the first ``rows`` only; the others must have no expert."""
        return self._replace(order=self.order[:rows])


def route(top_k_index: Tensor, num_experts: int) -> Routing:
    """Return the pairs of ``top_k_index``, integers ``[tokens, k]``, sorted by expert.

    A pair whose index is ``num_experts`` has no expert on this rank: it is sorted after all others.
    """
    # Radix sort makes one pass for some bits of its keys: narrow keys take a fraction of the time.
    narrow = torch.uint8 if num_experts < 256 else torch.int16 if num_experts < 32_768 else torch.int64
    experts, order = top_k_index.flatten().to(narrow).sort(stable=True)
    ids = torch.arange(num_experts, device=order.device, dtype=torch.int32)
    offsets = torch.searchsorted(experts.to(torch.int32), ids, right=True, out_int32=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return Routing(offsets, order, inverse, top_k_index.shape[1])


def permute_tokens(hidden: Tensor, routing: Routing, rows: Tensor | None = None) -> Tensor:
    """Return the token of each row of ``routing``, ``[rows, hidden]``, from ``[tokens, hidden]``.

    ``rows`` is the result of :func:`gather_tokens` for the same arguments, if it was computed before.
    """
    permuted: Tensor = _Permute.apply(hidden, gather_tokens(hidden, routing) if rows is None else rows, routing)
    return permuted


def gather_tokens(hidden: Tensor, routing: Routing) -> Tensor:
    """Return the rows of :func:`permute_tokens`, without a gradient."""
    return rows_of_tokens(hidden.detach(), routing.order, routing.inverse, routing.top_k)


def sum_tokens(rows: Tensor, routing: Routing) -> Tensor:
    """Return for each token the sum of its ``[rows, hidden]``, ``[tokens, hidden]``; zeros for one without a row."""
    tokens: Tensor = _Sum.apply(rows, routing)
    return tokens


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, routing: Routing) -> Tensor:
        ctx.save_for_backward(routing.inverse)
        ctx.top_k = routing.top_k
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return sum_of_rows(grads[0].contiguous(), inverse, ctx.top_k), None, None


class _Sum(torch.autograd.Function):
    # The routing is not a saved tensor: to save it again, a recomputed block would repeat the exchange of results.
    @staticmethod
    def forward(ctx: Any, rows: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return sum_of_rows(rows, routing.inverse, routing.top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather_tokens(grads[0].contiguous(), ctx.routing), None


def combine_rows(rows: Tensor, routing: Routing, weights: Tensor) -> Tensor:
    """Return for each token the sum of its ``[rows, hidden]``, weighted by ``[tokens, k]``; ``[tokens, hidden]``."""
    tokens: Tensor = _combine(rows, weights.contiguous(), routing.order, routing.inverse)
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
    return to_rows, by_pair((by_row * rows.to(wide)).sum(1), order, weights)


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


def rows_of_tokens(hidden: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """Return the token of each row, ``[rows, hidden]``, from ``[tokens, hidden]``."""
    if has_kernels(hidden):
        from veomni.ops.experts import permute_triton

        return permute_triton.rows_of_tokens(hidden, inverse, top_k, len(order))
    return hidden.index_select(0, order // top_k)


def by_pair(values: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Return the value of each pair, ``[tokens, k]`` in the dtype of ``weights``, from ``[rows]``; 0 without a row."""
    return torch.zeros_like(weights).view(-1).index_copy_(0, order, values.to(weights.dtype)).view_as(weights)


def sum_of_rows(
    rows: Tensor, inverse: Tensor, top_k: int, weights: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """Return for each token the sum of its rows, multiplied by ``weights`` ``[tokens, k]``; ``[tokens, hidden]``.

    Rows past ``offsets[-1]`` count as zeros; without offsets all rows count.
    """
    if has_kernels(rows):
        from veomni.ops.experts import permute_triton

        return permute_triton.sum_of_rows(rows, inverse, top_k, weights, offsets)
    places = inverse.unflatten(0, (-1, top_k))
    total = rows.new_zeros(len(places), rows.shape[1], dtype=wide_dtype(rows.dtype))
    end = len(rows) if offsets is None else offsets[-1]
    for choice in range(top_k if len(rows) else 0):  # one after another: no wide copy of all rows
        place = places[:, choice]
        values = rows.index_select(0, place.clamp(max=len(rows) - 1)).masked_fill_((place >= end)[:, None], 0)
        total += values if weights is None else values * weights[:, choice, None].to(total.dtype)
    return total.to(rows.dtype)


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
