"""A matrix product per expert, on rows sorted by expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def grouped_matmul(rows: Tensor, weights: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Multiply every row by its expert's matrix; rows past ``offsets[-1]`` give anything.

    Args:
        rows: ``[rows, in]``, sorted by expert.
        weights: ``[experts, in, out]``, of any strides.
        offsets: Where each expert's rows end, int32 ``[experts]``.
        backend: "loop" or "grouped_mm".
    """
    if backend == "grouped_mm":
        return torch.nn.functional.grouped_mm(rows, weights, offs=offsets)
    product: Tensor = _Loop.apply(rows, weights, offsets)
    return product


class _Loop(torch.autograd.Function):
    """One product after another; an expert without a row gets a zero gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        ends = offsets.tolist()
        ctx.save_for_backward(rows, weights)
        ctx.ends = ends
        result = rows.new_zeros(len(rows), weights.shape[2])
        for expert, (start, end) in enumerate(_spans(ends)):
            torch.mm(rows[start:end], weights[expert], out=result[start:end])
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights = ctx.saved_tensors
        (grad,) = grads
        to_rows, to_weights = torch.zeros_like(rows), torch.zeros_like(weights)
        for expert, (start, end) in enumerate(_spans(ctx.ends)):
            torch.mm(grad[start:end], weights[expert].t(), out=to_rows[start:end])
            to_weights[expert] = rows[start:end].t() @ grad[start:end]
        return to_rows, to_weights, None


def _spans(ends: list[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends[:-1]], ends, strict=True))
