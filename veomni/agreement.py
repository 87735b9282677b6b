"""What all ranks must agree about before a step: one small reduction on the CPU, and no other collective for it.

It ends uneven data together, gives the token count that gradients are normalised by, and turns a signal to any one
process into a decision of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Agreement:
    """What the ranks agreed about.

    Attributes:
        ranks_with_batch: How many ranks have a batch.
        tokens: Supervised tokens over all ranks that read different data.
        stop: Whether any rank was asked to stop.
    """

    ranks_with_batch: int
    tokens: int
    stop: bool


def agree(*, has_batch: bool, tokens: int, stop: bool) -> Agreement:
    """Sum the three over all ranks and return the result, equal everywhere."""
    mine = torch.tensor([int(has_batch), tokens, int(stop)], dtype=torch.int64)
    dist.all_reduce(mine)
    with_batch, total, stopping = mine.tolist()
    return Agreement(with_batch, total, stopping > 0)
