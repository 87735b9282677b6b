from __future__ import annotations

import numpy as np
import pytest

from veomni.data.packing.best_fit import best_fit_decreasing, epoch_bins
from veomni.data.packing.order import Permutation, hashed_uniform, shuffled


def one_by_one(lengths, capacity):
    """Best-fit decreasing as the textbook has it; returns the free spaces."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in free if space >= length]
        if fitting:
            free.remove(min(fitting))
        free.append((min(fitting) if fitting else capacity) - length)
    return sorted(free)


@pytest.mark.parametrize("seed", range(60))
def test_packs_exactly_as_one_by_one(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 60))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 90)))
    rows = best_fit_decreasing(lengths, capacity)
    used = np.bincount(rows, weights=lengths).astype(int)
    assert sorted(capacity - used) == one_by_one(lengths.tolist(), capacity)


def test_fills_rows_of_log_normal_lengths():
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(600), 1.0, 100_000).astype(np.int64), 1, 4096)
    bins = epoch_bins(lengths, 4096, pack=True, shuffle=True, seed=0, epoch=0)
    used = np.add.reduceat(lengths[bins.samples], bins.offsets[:-1])
    assert used.max() <= 4096
    assert np.array_equal(np.sort(bins.samples), np.arange(100_000))
    assert lengths.sum() / (len(bins) * 4096) >= 0.999


def test_rows_depend_on_seed_and_epoch_and_their_number_does_not():
    lengths = np.random.default_rng(1).integers(1, 33, 500)

    def plan(seed, epoch):
        bins = epoch_bins(lengths, 32, pack=True, shuffle=True, seed=seed, epoch=epoch)
        rows = [tuple(bins[row]) for row in range(len(bins))]
        # What shares a row follows the order of the samples; the sequence of length patterns, that of the rows.
        return rows, {frozenset(row) for row in rows}, [sorted(lengths[list(row)]) for row in rows]

    first, again, *others = plan(0, 0), plan(0, 0), plan(0, 1), plan(1, 0)
    assert first == again
    for other in others:
        assert len(other[0]) == len(first[0])
        assert other[1] != first[1]
        assert other[2] != first[2]


def test_unshuffled_rows_come_in_the_order_of_their_first_sample():
    lengths = np.random.default_rng(2).integers(1, 33, 200)
    bins = epoch_bins(lengths, 32, pack=True, shuffle=False, seed=0, epoch=0)
    firsts = [bins[row][0] for row in range(len(bins))]
    assert firsts == sorted(firsts)
    assert all(np.all(np.diff(bins[row]) > 0) for row in range(len(bins)))


def test_unpacked_rows_hold_one_sample():
    bins = epoch_bins(np.array([3, 9, 4]), 10, pack=False, shuffle=False, seed=0, epoch=0)
    assert [list(bins[row]) for row in range(len(bins))] == [[0], [1], [2]]


def test_the_order_is_frozen():
    """A run resumed with a later version must find its data in the same order."""
    assert shuffled(8, "samples", 0, 0).tolist() == FROZEN
    assert [Permutation(8, "x", 0)[index] for index in range(8)] == FROZEN_WITHOUT_TABLE
    assert sorted(shuffled(1000, "samples", 5, 2)) == list(range(1000))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 63, 1000, 4097])
def test_a_permutation_without_a_table_is_one(count):
    drawn = [Permutation(count, "x", seed) for seed in (0, 1)]
    assert [sorted(one[index] for index in range(count)) for one in drawn] == [list(range(count))] * 2
    with pytest.raises(IndexError):
        drawn[0][count]


def test_a_permutation_without_a_table_mixes():
    """Neighbours and places are independent: over many keys every place is taken about equally often."""
    taken = np.zeros((11, 11))
    apart = []
    for key in range(2000):
        one = Permutation(11, "x", key)
        order = [one[index] for index in range(11)]
        taken[range(11), order] += 1
        apart.append(abs(order[3] - order[4]))
    assert taken.min() > 110
    assert taken.max() < 255  # 182 expected, standard deviation 13
    assert abs(np.mean(apart) - 4) < 0.25


def test_long_lengths_are_sorted_by_both_halves():
    lengths = np.random.default_rng(0).integers(1, 1 << 20, 500)
    assert sorted((1 << 20) - np.bincount(best_fit_decreasing(lengths, 1 << 20), weights=lengths)) == one_by_one(
        lengths.tolist(), 1 << 20
    )


def test_hashes_are_uniform():
    counts, _ = np.histogram(hashed_uniform(np.arange(100_000), "held-out", 3), bins=10, range=(0, 1))
    assert counts.min() > 9_600  # 10,000 expected, standard deviation 95
    assert counts.max() < 10_400


FROZEN = [2, 3, 6, 7, 1, 0, 4, 5]
FROZEN_WITHOUT_TABLE = [4, 0, 6, 2, 5, 1, 3, 7]
