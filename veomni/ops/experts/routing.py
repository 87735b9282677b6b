"""Sort (token, expert) pairs by expert, without asking the device for a number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The ``tokens * k`` pairs of token and expert, in the order of experts.

    Attributes:
        order: Of every sorted pair its place in the flattened choice, int64 ``[tokens * k]``; equal experts in order.
        inverse: Of every pair its place once sorted, int64 ``[tokens * k]``.
        counts: Pairs of each expert, int64 ``[num_experts]``.
        offsets: Where each expert's pairs end, int32 ``[num_experts]``.
    """

    order: Tensor
    inverse: Tensor
    counts: Tensor
    offsets: Tensor


def route(top_k_index: Tensor, num_experts: int) -> Routing:
    """Return the pairs of ``top_k_index``, int64 ``[tokens, k]``, sorted by expert."""
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    return Routing(order, inverse, counts, counts.cumsum(0).to(torch.int32))
