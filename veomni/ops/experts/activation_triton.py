"""The gated activation between an expert's two products on a GPU, and its gradient: one pass each, in float32."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load(gate_up, bias, row, expert, place, mask, width, BIASED: tl.constexpr, INTERLEAVED: tl.constexpr):
    first = place * 2 if INTERLEAVED else place
    second = first + 1 if INTERLEAVED else place + width
    base = row.to(tl.int64)[:, None] * (2 * width)
    gate = tl.load(gate_up + base + first, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + base + second, mask=mask, other=0.0).to(tl.float32)
    if BIASED:
        base = expert.to(tl.int64)[:, None] * (2 * width)
        gate += tl.load(bias + base + first, mask=mask, other=0.0).to(tl.float32)
        up += tl.load(bias + base + second, mask=mask, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _forward_kernel(
    gate_up, bias, expert_of_row, weights, order, target, rows, width, alpha, limit, shift,
    BIASED: tl.constexpr, WEIGHTED: tl.constexpr, CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = inside[:, None] & (place < width)
    expert = tl.load(expert_of_row + row, mask=inside, other=0) if BIASED else row
    gate, up = _load(gate_up, bias, row, expert, place, mask, width, BIASED, INTERLEAVED)
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    result = (up + shift) * gate * tl.sigmoid(alpha * gate)
    if WEIGHTED:
        pair = tl.load(order + row, mask=inside, other=0)
        result *= tl.load(weights + pair, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(target + row.to(tl.int64)[:, None] * width + place, result.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    gate_up, bias, expert_of_row, weights, order, offsets, grad, to_gate_up, target, to_weights,
    rows, width, alpha, limit, shift,
    BIASED: tl.constexpr, WEIGHTED: tl.constexpr, CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    expert = tl.load(expert_of_row + row, mask=inside, other=0) if BIASED else row
    if WEIGHTED:
        pair = tl.load(order + row, mask=inside, other=0)
        weight = tl.load(weights + pair, mask=inside, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (place < width)
        gate, up = _load(gate_up, bias, row, expert, place, mask, width, BIASED, INTERLEAVED)
        outer = tl.load(grad + row.to(tl.int64)[:, None] * width + place, mask=mask, other=0.0).to(tl.float32)
        bounded = gate
        shifted = up
        if CLAMPED:
            bounded = tl.minimum(gate, limit)
            shifted = tl.minimum(tl.maximum(up, -limit), limit)
        shifted += shift
        slope = tl.sigmoid(alpha * bounded)
        glu = bounded * slope
        result = shifted * glu
        if WEIGHTED:
            total += outer * result
            outer *= weight
            result *= weight
        to_gate = outer * shifted * (slope + alpha * glu * (1.0 - slope))
        to_up = outer * glu
        if CLAMPED:
            to_gate = tl.where(gate <= limit, to_gate, 0.0)
            to_up = tl.where(tl.abs(up) <= limit, to_up, 0.0)
        kind = to_gate_up.dtype.element_ty
        first = place * 2 if INTERLEAVED else place
        second = first + 1 if INTERLEAVED else place + width
        base = row.to(tl.int64)[:, None] * (2 * width)
        tl.store(to_gate_up + base + first, to_gate.to(kind), mask=mask)
        tl.store(to_gate_up + base + second, to_up.to(kind), mask=mask)
        tl.store(target + row.to(tl.int64)[:, None] * width + place, result.to(kind), mask=mask)
    if WEIGHTED:
        # A row without an expert holds anything.
        sums = tl.where(row < tl.load(offsets + EXPERTS - 1), tl.sum(total, 1), 0.0)
        tl.store(to_weights + pair, sums.to(to_weights.dtype.element_ty), mask=inside)


@torch.library.custom_op("veomni::swiglu", mutates_args=())
def swiglu(
    gate_up: Tensor, bias: Tensor | None, expert_of_row: Tensor | None, weights: Tensor | None, order: Tensor | None,
    alpha: float, limit: float, shift: float, interleaved: bool,
) -> Tensor:  # fmt: skip
    """Return the activation, ``[rows, intermediate]``; see :func:`veomni.ops.experts.activation.swiglu`.

    Args:
        gate_up: ``[rows, 2 * intermediate]``, contiguous.
        bias: Added to each row by its expert, ``[experts, 2 * intermediate]``, or None.
        expert_of_row: int64 ``[rows]``; needed with ``bias``.
        weights: ``[tokens, k]``, a factor for each row, or None.
        order: Place of each row's pair in ``weights``, int64 ``[rows]``.
        alpha: Slope of the sigmoid.
        limit: Largest gate, and largest magnitude of the other half.
        shift: Added to the other half.
        interleaved: Whether the halves take turns.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    target = gate_up.new_empty(rows, width)
    if target.numel():
        block = _block(width)
        _forward_kernel[(triton.cdiv(rows, 4), triton.cdiv(width, block))](
            gate_up, bias, expert_of_row, weights, order, target, rows, width, alpha, _finite(limit), shift,
            BIASED=bias is not None, WEIGHTED=weights is not None, CLAMPED=math.isfinite(limit),
            INTERLEAVED=interleaved, ROWS=4, BLOCK=block,
        )  # fmt: skip
    return target


@torch.library.custom_op("veomni::swiglu_backward", mutates_args=())
def swiglu_backward(
    gate_up: Tensor, grad: Tensor, bias: Tensor | None, expert_of_row: Tensor | None, weights: Tensor | None,
    order: Tensor | None, offsets: Tensor, alpha: float, limit: float, shift: float, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradient of ``gate_up``, the activation once more, and the gradient of ``weights`` (empty without).

    Args:
        gate_up: ``[rows, 2 * intermediate]``, contiguous.
        grad: Gradient of the activation, ``[rows, intermediate]``, contiguous.
        bias: As in :func:`swiglu`.
        expert_of_row: As in :func:`swiglu`.
        weights: As in :func:`swiglu`.
        order: As in :func:`swiglu`.
        offsets: Where each expert's rows end, int32 ``[experts]``.
        alpha: As in :func:`swiglu`.
        limit: As in :func:`swiglu`.
        shift: As in :func:`swiglu`.
        interleaved: As in :func:`swiglu`.
    """
    rows, width = grad.shape
    to_gate_up, target = torch.empty_like(gate_up), torch.empty_like(grad)
    to_weights = gate_up.new_empty(0) if weights is None else torch.empty_like(weights)
    if target.numel():
        _backward_kernel[(triton.cdiv(rows, 4),)](
            gate_up, bias, expert_of_row, weights, order, offsets, grad, to_gate_up, target, to_weights,
            rows, width, alpha, _finite(limit), shift,
            BIASED=bias is not None, WEIGHTED=weights is not None, CLAMPED=math.isfinite(limit),
            INTERLEAVED=interleaved, EXPERTS=offsets.shape[0], ROWS=4, BLOCK=_block(width),
        )  # fmt: skip
    return to_gate_up, target, to_weights


@swiglu.register_fake
def _(gate_up, bias, expert_of_row, weights, order, alpha, limit, shift, interleaved):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@swiglu_backward.register_fake
def _(gate_up, grad, bias, expert_of_row, weights, order, offsets, alpha, limit, shift, interleaved):
    to_weights = gate_up.new_empty(0) if weights is None else torch.empty_like(weights)
    return torch.empty_like(gate_up), torch.empty_like(grad), to_weights


def _block(width: int) -> int:
    return min(256, triton.next_power_of_2(width))


def _finite(limit: float) -> float:
    return limit if math.isfinite(limit) else 0.0
