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
    """Return the pairs of ``top_k_index``, int64 ``[tokens, k]``, sorted by expert.

    A pair whose expert is ``num_experts`` means no expert (zaya skips experts so): it is sorted behind all others.
    """
    # Radix sort passes over the bits of its keys: narrow ones take a fraction of the time.
    narrow = torch.uint8 if num_experts < 256 else torch.int16 if num_experts < 32_768 else torch.int64
    experts, order = top_k_index.flatten().to(narrow).sort(stable=True)
    inverse = torch.empty_like(order)
    inverse.scatter_(0, order, torch.arange(len(order), device=order.device))
    ids = torch.arange(num_experts, device=order.device)
    offsets = torch.searchsorted(experts.to(torch.int32), ids.to(torch.int32), right=True, out_int32=True)
    counts = offsets.diff(prepend=offsets.new_zeros(1)).to(torch.int64)
    return Routing(order, inverse, counts, offsets)
