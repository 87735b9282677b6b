"""Moving rows between the order of tokens and the order of experts on a GPU; sums in float32 registers, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _scatter_kernel(source, inverse, target, rows, channels, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    # A token is read once and written to all of its rows; a pair past the last row has none.
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < channels
    values = tl.load(source + token * channels + place, mask=inside)
    for choice in tl.static_range(TOP_K):
        row = tl.load(inverse + token * TOP_K + choice)
        tl.store(target + row * channels + place, values, mask=inside & (row < rows))


@triton.jit
def _sum_kernel(
    rows, inverse, weights, offsets, target, count, channels,
    WEIGHTED: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < channels
    end = tl.load(offsets + EXPERTS - 1) if EXPERTS else count
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(inverse + token * TOP_K + choice)
        values = tl.load(rows + row * channels + place, mask=inside & (row < end), other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weights + token * TOP_K + choice).to(tl.float32)
        total += values
    tl.store(target + token * channels + place, total.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _sum_backward_kernel(
    grad, rows, weights, order, to_rows, to_weights, channels, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(order + row)
    weight = tl.load(weights + pair).to(tl.float32)
    grad += (pair // TOP_K) * channels
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, channels, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < channels
        values = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        total += values * tl.load(rows + row * channels + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(to_rows + row * channels + place, (values * weight).to(to_rows.dtype.element_ty), mask=inside)
    tl.store(to_weights + pair, tl.sum(total, 0).to(to_weights.dtype.element_ty))


@triton.jit
def _zero_tail_kernel(rows, offsets, count, channels, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    end = tl.load(offsets + EXPERTS - 1)
    last = tl.program_id(0) * ROWS + ROWS
    if last > end:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        for start in range(0, channels, BLOCK):
            place = start + tl.arange(0, BLOCK)[None, :]
            mask = ((row >= end) & (row < count))[:, None] & (place < channels)
            target = rows + row.to(tl.int64)[:, None] * channels + place
            tl.store(target, tl.zeros((ROWS, BLOCK), dtype=rows.dtype.element_ty), mask=mask)


def rows_of_tokens(hidden: Tensor, inverse: Tensor, top_k: int, rows: int) -> Tensor:
    """See :func:`veomni.ops.experts.permute.rows_of_tokens`."""
    tokens, channels = hidden.shape
    target = hidden.new_empty(rows, channels)
    if target.numel():
        block = _block(channels, 2048)
        _scatter_kernel[(tokens, triton.cdiv(channels, block))](
            hidden.contiguous(), inverse, target, rows, channels, TOP_K=top_k, BLOCK=block, num_warps=_warps(block)
        )
    return target


def sum_of_rows(rows: Tensor, inverse: Tensor, top_k: int, weights: Tensor | None, offsets: Tensor | None) -> Tensor:
    """See :func:`veomni.ops.experts.permute.sum_of_rows`."""
    tokens, channels = inverse.shape[0] // top_k, rows.shape[1]
    target = rows.new_empty(tokens, channels)
    if target.numel():
        block = _block(channels, 2048)
        _sum_kernel[(tokens, triton.cdiv(channels, block))](
            rows.contiguous(), inverse, inverse if weights is None else weights.contiguous(),
            inverse if offsets is None else offsets, target, len(rows), channels, WEIGHTED=weights is not None,
            EXPERTS=0 if offsets is None else offsets.shape[0], TOP_K=top_k, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return target


def sum_of_rows_backward(grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows and weights of :func:`sum_of_rows`."""
    to_rows, to_weights = torch.empty_like(rows), torch.zeros_like(weights)
    if rows.numel():
        block = _block(rows.shape[1], 2048)
        _sum_backward_kernel[(rows.shape[0],)](
            grad, rows, weights, order, to_rows, to_weights, rows.shape[1], TOP_K=weights.shape[1], BLOCK=block,
            num_warps=_warps(block),
        )  # fmt: skip
    return to_rows, to_weights


def zero_tail_(rows: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`veomni.ops.experts.permute.zero_tail_`; programs without such rows, usually all, write nothing."""
    if rows.numel():
        count, channels = rows.shape
        _zero_tail_kernel[(triton.cdiv(count, 16),)](
            rows, offsets, count, channels, EXPERTS=offsets.shape[0], ROWS=16, BLOCK=_block(channels, 256)
        )
    return rows


def _block(channels: int, most: int) -> int:
    return min(most, triton.next_power_of_2(channels))


def _warps(block: int) -> int:
    return max(1, min(8, block // 256))
