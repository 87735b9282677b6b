from __future__ import annotations

import numpy as np
import pytest

from veomni.data.packing.balance import balanced_share


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_row_is_computed_once_and_by_equal_numbers(size):
    costs = np.random.default_rng(0).integers(0, 1000, 64)
    shares = [balanced_share(costs, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(shares)) == list(range(64))
    assert {len(share) for share in shares} == {64 // size}


def test_ranks_have_as_much_to_do_in_every_micro_batch_and_in_all():
    """Rows of documents whose lengths are log-normal: from 2 and more times the mean to within a few percent."""
    rng = np.random.default_rng(1)
    worst = {"dealt": [], "balanced": []}
    for _ in range(50):
        rows = [rng.multinomial(8192, rng.dirichlet(np.ones(rng.integers(1, 12)))) for _ in range(64)]
        costs = np.array([(row.astype(np.int64) ** 2).sum() for row in rows])
        balanced = np.array([costs[balanced_share(costs, rank, 8)] for rank in range(8)])
        for name, loads in (("dealt", costs.reshape(8, 8).T), ("balanced", balanced)):
            waiting = loads.max(0).sum() / loads.mean(0).sum()  # in each micro-batch all wait for the slowest
            worst[name].append((waiting, loads.sum(1).max() / loads.sum(1).mean()))
    dealt, balanced = (np.mean(worst[name], 0) for name in ("dealt", "balanced"))
    assert dealt[0] > 1.8
    assert balanced[0] < 1.15
    assert dealt[1] > 1.2
    assert balanced[1] < 1.02
