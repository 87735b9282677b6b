"""The experts of a module on rows that are sorted by expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veomni.models.transformers_api.experts import apply_gate
from veomni.ops.experts.fused import Rows, expert_down, expert_up
from veomni.ops.experts.layout import ExpertLayout, expert_layout, local_parameter
from veomni.ops.experts.matmul import add_bias, expert_linear


def expert_rows(module: nn.Module, rows: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Run every row through its expert.

    Args:
        module: A transformers experts module.
        rows: ``[rows, hidden]``, sorted by local expert.
        offsets: Where each local expert's rows end, int32 ``[local_experts]``.
        backend: "loop", "grouped_mm", "triton" or "npu".

    Returns:
        ``[rows, hidden]``; rows past ``offsets[-1]`` are zeros and have zero gradients. An expert without a row gets
        zero gradients, also where there is no row at all.
    """
    layout = expert_layout(module)
    dtype = compute_dtype(module, rows)
    if layout.activation is None or layout.has_post_expert_norm:
        return called_rows(module, layout, rows.to(dtype), offsets, backend).to(rows.dtype)
    first, down = weight(module, layout, layout.first, dtype), weight(module, layout, "down_proj", dtype)
    where = Rows(offsets)
    gate_up = expert_up(rows.to(dtype), first, where, backend)
    result = expert_down(
        gate_up, bias(module, layout, layout.first, dtype), None, down, layout.activation, where, backend
    )
    return add_bias(result, bias(module, layout, "down_proj", dtype), offsets, backend).to(rows.dtype)


def called_rows(module: nn.Module, layout: ExpertLayout, rows: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Run every row through its expert, the module's own activation (and norm) between (and behind) the products."""
    experts: Any = module
    weights = [weight(module, layout, name, rows.dtype) for name in (layout.first, "down_proj")]
    biases = [bias(module, layout, name, rows.dtype) for name in (layout.first, "down_proj")]
    hidden = add_bias(expert_linear(rows, weights[0], offsets, backend), biases[0], offsets, backend)
    hidden = apply_gate(module, hidden) if layout.has_gate else experts.act_fn(hidden)
    hidden = add_bias(expert_linear(hidden.to(rows.dtype), weights[1], offsets, backend), biases[1], offsets, backend)
    return experts.post_expert_norm(hidden) if layout.has_post_expert_norm else hidden


def weight(module: nn.Module, layout: ExpertLayout, name: str, dtype: torch.dtype) -> Tensor:
    """Return this rank's matrices as ``[local_experts, in, out]`` in ``dtype``."""
    matrices = local_parameter(module, name).to(dtype)
    return matrices if layout.is_transposed else matrices.transpose(1, 2)


def bias(module: nn.Module, layout: ExpertLayout, name: str, dtype: torch.dtype) -> Tensor | None:
    """Return this rank's biases as ``[local_experts, out]`` in ``dtype``, or None."""
    return local_parameter(module, f"{name}_bias").to(dtype) if layout.has_bias else None


def compute_dtype(module: nn.Module, rows: Tensor) -> torch.dtype:
    """Return what the products are taken in: the format of the autocast around, or that of the weights."""
    if torch.is_autocast_enabled(rows.device.type):
        return torch.get_autocast_dtype(rows.device.type)
    dtype: torch.dtype = local_parameter(module, "down_proj").dtype
    return dtype
