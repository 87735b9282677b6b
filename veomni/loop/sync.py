"""What all ranks agree on before a step: one small reduction on the CPU.

It ends uneven data together, gives the sums that gradients are normalised by, and turns a signal to any one process
into a decision of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class StepTotals:
    """Sums over all ranks; each is what the loss of some model is a mean over.

    Attributes:
        token_weight: Weighted number of supervised tokens, of a loss that shifts its labels.
        labels: Labels that are not ``IGNORE_INDEX``, of a loss that does not; rows, where there are no labels.
        tokens: Tokens without padding, supervised or not.
        samples: Rows.
        flops_causal: FLOPs with causal attention counted as such; 0 when they are not known.
        flops_full: FLOPs with attention counted as the whole square.
        components: Tokens that the loss of each decoder of a composed model is the mean of.
    """

    token_weight: float = 0.0
    labels: float = 0.0
    tokens: float = 0.0
    samples: float = 0.0
    flops_causal: float = 0.0
    flops_full: float = 0.0
    components: Mapping[str, int] = field(default_factory=dict)


def sync_step(counts: Mapping[str, float]) -> dict[str, float]:
    """Return the sum of every count over all ranks; collective.

    Args:
        counts: By the same names in the same order on every rank. They travel as float64, exact up to 2^53.
    """
    sums = torch.tensor(list(counts.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(counts, sums.tolist(), strict=True))


def extremes(value: float) -> tuple[float, float]:
    """Return the least and the greatest of a number over all ranks; collective."""
    if not dist.is_initialized():
        return value, value
    ends = torch.tensor([value, -value], dtype=torch.float64)
    dist.all_reduce(ends, op=dist.ReduceOp.MIN)
    return ends[0].item(), -ends[1].item()
