"""What all ranks must agree about before a step: one small reduction on the CPU, and no other collective for it.

It ends uneven data together, gives the sum of tokens, or of their weights, that gradients are normalised by, and turns
a signal to any one process into a decision of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from veomni.loop.step import StepWork


@dataclass(frozen=True)
class Agreement:
    """What the ranks agreed about; sums are over all ranks.

    Attributes:
        ranks_with_batch: How many ranks have a batch.
        loss_weight: Supervised tokens, each as often as it weighs.
        stop: Whether any rank was asked to stop.
        work: What is computed.
        parts: Tokens of the losses of each part.
        ranks_drained: How many ranks have no document left in what they read.
    """

    ranks_with_batch: int
    loss_weight: float
    stop: bool
    work: StepWork
    parts: dict[str, int]
    ranks_drained: int = 0


def agree(
    *,
    has_batch: bool,
    loss_weight: float,
    stop: bool,
    work: StepWork,
    parts: Mapping[str, int] | None = None,
    drained: bool = False,
) -> Agreement:
    """Sum everything over all ranks and return the result, equal everywhere.

    It travels as float64, which holds counts exactly up to 2^53. ``parts`` has the same names on every rank.
    """
    own = dict(parts or {})
    numbers = [has_batch, loss_weight, stop, drained, work.tokens, work.flops_causal, work.flops_full, *own.values()]
    mine = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(mine)
    with_batch, total, stopping, drained_ranks, *rest = mine.tolist()
    counts = dict(zip(own, map(int, rest[3:]), strict=True))
    return Agreement(int(with_batch), total, stopping > 0, StepWork(*rest[:3]), counts, int(drained_ranks))
