"""Which rank computes which rows of a step, so that all have about equally much to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def by_cost(costs: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the order of rows from most to least work.

    Ranks that each order their rows so have about equally much to do in every micro-batch.
    """
    return np.argsort(-np.asarray(costs, np.int64), kind="stable")


def balanced_share(costs: NDArray[np.int64], rank: int, size: int, micro_batch_size: int) -> NDArray[np.int64]:
    """Return the rows of a step that a rank computes, micro-batch by micro-batch.

    Rows are ordered from most to least work, and each micro-batch of all ranks takes the next ones: they are alike, so
    no rank waits long for another. Among the ranks, the largest goes to the one that has had the least so far.

    Args:
        costs: Work of each row of the step, int64 ``[rows]``; as many as ranks times a multiple of the micro-batch.
        rank: Whose rows are returned.
        size: Number of ranks.
        micro_batch_size: Rows of a micro-batch.
    """
    order = by_cost(costs)
    loads = np.zeros(size, np.int64)
    mine: list[int] = []
    for start in range(0, len(order), size * micro_batch_size):
        for at in range(start, start + size * micro_batch_size, size):
            rows = order[at : at + size]
            for row, chosen in zip(rows.tolist(), np.argsort(loads, kind="stable").tolist(), strict=False):
                loads[chosen] += costs[row]
                if chosen == rank:
                    mine.append(row)
    return np.array(mine, np.int64)
