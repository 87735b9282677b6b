"""The experts of a module on rows that are sorted by expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from veomni.ops.experts.matmul import grouped_matmul


def local_parameter(module: nn.Module, name: str) -> Tensor:
    """Return a parameter of the experts that this rank holds, ``[local_experts, ...]``."""
    parameter = getattr(module, name)
    local: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local


def expert_rows(module: nn.Module, rows: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Run every row through its expert.

    Args:
        module: A transformers experts module, or one that has its parameters and flags.
        rows: ``[rows, hidden]``, sorted by local expert.
        offsets: Where each local expert's rows end, int32 ``[local_experts]``.
        backend: "loop" or "grouped_mm".

    Returns:
        ``[rows, hidden]``; rows past ``offsets[-1]`` are zeros and have zero gradients.
    """
    experts: Any = module
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    places = torch.arange(len(rows), device=rows.device, dtype=offsets.dtype)
    of_row = torch.searchsorted(offsets, places, right=True)
    there = (of_row < len(offsets))[:, None]
    of_row = of_row.clamp(max=len(offsets) - 1)
    hidden = _linear(experts, first, rows.masked_fill(~there, 0), offsets, of_row, backend)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    hidden = _linear(experts, "down_proj", hidden, offsets, of_row, backend)
    if getattr(experts, "has_post_expert_norm", False):  # transformers 5.17 knows no such layer
        hidden = experts.post_expert_norm(hidden)
    return hidden.masked_fill(~there, 0).to(rows.dtype)


def _linear(experts: Any, name: str, rows: Tensor, offsets: Tensor, of_row: Tensor, backend: str) -> Tensor:
    weights = local_parameter(experts, name)
    weights = weights if experts.is_transposed else weights.transpose(1, 2)
    product = grouped_matmul(rows.to(weights.dtype), weights, offsets, backend)
    if experts.has_bias:
        product = product + local_parameter(experts, f"{name}_bias").index_select(0, of_row)
    return product
