"""Which rank computes which rows of a step, so that all have about equally much to do."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def by_cost(costs: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the order of rows from most to least work; ranks that order theirs so have alike micro-batches."""
    return np.argsort(-np.asarray(costs, np.int64), kind="stable")


def balanced_share(costs: NDArray[np.int64], rank: int, size: int) -> NDArray[np.int64]:
    """Return the rows of a step that ``rank`` computes, in order; ``costs``, int64 ``[rows]``, is the work of each.

    Rows are ordered from most to least work, and all ranks take the next ones together: those of a micro-batch are
    alike, so no rank waits long for another. The largest goes to the rank that has had the least so far.
    """
    loads = np.zeros(size, np.int64)
    mine = []
    for rows in by_cost(costs).reshape(-1, size):
        ranks = np.argsort(loads, kind="stable")
        loads[ranks] += costs[rows]
        mine.append(rows[ranks == rank].item())
    return np.array(mine, np.int64)
