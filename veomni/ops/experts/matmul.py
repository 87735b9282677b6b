"""A matrix product per expert, on rows sorted by expert: one function per product, backends behind it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veomni.ops.experts.permute import past_end, zero_tail_


def grouped_matmul(rows: Tensor, weights: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Multiply every row by its expert's matrix; rows past ``offsets[-1]`` give anything. Has no gradient.

    Args:
        rows: ``[rows, in]``, sorted by expert.
        weights: ``[experts, in, out]``; every matrix or its transpose contiguous.
        offsets: Where each expert's rows end, int32 ``[experts]``.
        backend: The matmul backend.
    """
    if backend == "loop" or not rows.shape[0]:
        return _loop_matmul(rows, weights, offsets)
    if backend == "triton":
        from veomni.ops.experts import matmul_triton

        if matmul_triton.tiles_fit(weights):
            return matmul_triton.tiled_matmul(rows, weights, offsets)
    if backend == "npu":
        from veomni.ops.experts import matmul_npu

        return matmul_npu.grouped_matmul(rows, weights, offsets)
    return F.grouped_mm(rows, weights, offs=offsets)


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Return ``left.T @ right`` over each expert's rows, ``[experts, left, right]``; zeros for one without rows.

    Args:
        left: ``[rows, left]``, sorted by expert.
        right: ``[rows, right]``.
        offsets: Where each expert's rows end, int32 ``[experts]``.
        backend: The matmul backend.
    """
    if backend == "loop" or not left.shape[0]:
        return _loop_outer(left, right, offsets)
    if backend == "npu":
        from veomni.ops.experts import matmul_npu

        return matmul_npu.grouped_outer(left, right, offsets)
    return F.grouped_mm(left.t(), right, offs=offsets)


def _spans(offsets: Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@torch.library.custom_op("veomni::loop_matmul", mutates_args=())
def _loop_matmul(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    result = rows.new_zeros(rows.shape[0], weights.shape[2])
    for expert, (start, end) in enumerate(_spans(offsets)):
        torch.mm(rows[start:end], weights[expert], out=result[start:end])
    return result


@torch.library.custom_op("veomni::loop_outer", mutates_args=())
def _loop_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    result = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
    for expert, (start, end) in enumerate(_spans(offsets)):
        torch.mm(left[start:end].t(), right[start:end], out=result[expert])
    return result


@_loop_matmul.register_fake
def _(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


@_loop_outer.register_fake
def _(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(offsets.shape[0], left.shape[1], right.shape[1])


def expert_linear(rows: Tensor, weights: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Multiply every row by its expert's matrix, with gradients.

    Args:
        rows: ``[rows, in]``, sorted by expert.
        weights: ``[experts, in, out]``; every matrix or its transpose contiguous.
        offsets: Where each expert's rows end, int32 ``[experts]``.
        backend: The matmul backend.

    Returns:
        ``[rows, out]``; rows past ``offsets[-1]`` are zeros and have zero gradients.
    """
    product: Tensor = _ExpertLinear.apply(rows, weights, offsets, backend)
    return product


def add_bias(rows: Tensor, bias: Tensor | None, offsets: Tensor, backend: str) -> Tensor:
    """Add its expert's bias to every row, with gradients; rows past ``offsets[-1]`` stay as they are.

    Args:
        rows: ``[rows, out]``, sorted by expert.
        bias: ``[experts, out]``, or None to do nothing.
        offsets: Where each expert's rows end, int32 ``[experts]``.
        backend: Who sums the gradients.
    """
    if bias is None:
        return rows
    biased: Tensor = _AddBias.apply(rows, bias, offsets, backend)
    return biased


def expert_of_row(rows: Tensor, offsets: Tensor) -> Tensor:
    """Return the expert of every row, int64 ``[rows]``; the last one for rows that have none."""
    places = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, places, right=True).clamp(max=offsets.shape[0] - 1)


def sum_by_expert(rows: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Return the sum of each expert's rows, ``[experts, channels]``."""
    # A product with ones: its sums are taken in float32, and in one pass. Eight columns, as kernels need 16 bytes.
    ones = rows.new_ones(rows.shape[0], 8)
    return grouped_outer(ones, rows, offsets, backend)[:, 0]


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, offsets: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(rows, weights, offsets)
        ctx.backend = backend
        return zero_tail_(grouped_matmul(rows, weights, offsets, backend), offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, offsets = ctx.saved_tensors
        needs_rows, needs_weights, *_ = ctx.needs_input_grad
        grad = grads[0].contiguous()
        to_rows = to_weights = None
        if needs_rows:
            to_rows = grouped_matmul(grad, weights.transpose(1, 2), offsets, ctx.backend)
            to_rows = zero_tail_(to_rows, offsets)
        if needs_weights:
            to_weights = weights_gradient(rows, grad, weights, offsets, ctx.backend)
        return to_rows, to_weights, None, None


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor, offsets: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.backend = backend
        added = bias.index_select(0, expert_of_row(rows, offsets))
        return rows + added.masked_fill_(past_end(rows, offsets), 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        return grads[0], sum_by_expert(grads[0].contiguous(), offsets, ctx.backend), None, None


def weights_gradient(rows: Tensor, grad: Tensor, weights: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Return the gradient of ``weights``, ``[experts, in, out]``, in the memory order of ``weights``.

    Args:
        rows: What was multiplied, ``[rows, in]``.
        grad: Gradient of the product, ``[rows, out]``.
        weights: ``[experts, in, out]``.
        offsets: Where each expert's rows end, int32 ``[experts]``.
        backend: The matmul backend.
    """
    if weights.stride(1) == 1 and weights.shape[1] > 1:  # the parameter is [experts, out, in]
        return grouped_outer(grad, rows, offsets, backend).transpose(1, 2)
    return grouped_outer(rows, grad, offsets, backend)
