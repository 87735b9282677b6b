"""The gated activation between an expert's two products on a GPU, and its gradient: one pass each, in float32."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from veomni.ops.experts.activation import SwiGLU
from veomni.ops.experts.permute import Routing


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
    BIASED: tl.constexpr, CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr,
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
    pair = tl.load(order + row, mask=inside, other=0)
    result *= tl.load(weights + pair, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(target + row.to(tl.int64)[:, None] * width + place, result.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    gate_up, bias, expert_of_row, weights, order, offsets, grad, to_gate_up, target, to_weights,
    rows, width, alpha, limit, shift,
    BIASED: tl.constexpr, CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    expert = tl.load(expert_of_row + row, mask=inside, other=0) if BIASED else row
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
    # A row without an expert is uninitialised memory.
    sums = tl.where(row < tl.load(offsets + EXPERTS - 1), tl.sum(total, 1), 0.0)
    tl.store(to_weights + pair, sums.to(to_weights.dtype.element_ty), mask=inside)


def swiglu(
    gate_up: Tensor, bias: Tensor | None, expert_of_row: Tensor | None, weights: Tensor, order: Tensor, form: SwiGLU
) -> Tensor:
    """See :func:`veomni.ops.experts.activation.activate`; ``bias`` needs ``expert_of_row``."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    target = gate_up.new_empty(rows, width)
    if target.numel():
        block = _block(width)
        _forward_kernel[(triton.cdiv(rows, 4), triton.cdiv(width, block))](
            gate_up, bias, expert_of_row, weights, order, target, rows, width, *_numbers(form),
            BIASED=bias is not None, **_flags(form), ROWS=4, BLOCK=block,
        )  # fmt: skip
    return target


def swiglu_backward(
    grad: Tensor, gate_up: Tensor, bias: Tensor | None, expert_of_row: Tensor | None, weights: Tensor,
    routing: Routing, form: SwiGLU,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`veomni.ops.experts.activation.activate_backward`."""
    rows, width = grad.shape
    to_gate_up, target = torch.empty_like(gate_up), torch.empty_like(grad)
    to_weights = torch.zeros_like(weights)
    if target.numel():
        _backward_kernel[(triton.cdiv(rows, 4),)](
            gate_up, bias, expert_of_row, weights, routing.order, routing.offsets, grad, to_gate_up, target,
            to_weights, rows, width, *_numbers(form), BIASED=bias is not None, **_flags(form),
            EXPERTS=routing.offsets.shape[0], ROWS=4, BLOCK=_block(width),
        )  # fmt: skip
    return to_gate_up, target, to_weights


def _numbers(form: SwiGLU) -> tuple[float, float, float]:
    return form.alpha, form.limit if math.isfinite(form.limit) else 0.0, form.shift


def _flags(form: SwiGLU) -> dict[str, bool]:
    return {"CLAMPED": math.isfinite(form.limit), "INTERLEAVED": form.interleaved}


def _block(width: int) -> int:
    return min(256, triton.next_power_of_2(width))
