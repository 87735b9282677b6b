"""Which samples share a row: best-fit decreasing, and the order of the rows.

The longest sample comes first, and each goes into the fullest row it fits in. Rows with the same free space are
interchangeable, so samples of one length are placed by the run: a row with ``r`` tokens free takes ``r // length`` of
them and keeps ``r % length`` free. That is the same packing as one by one, in O(d log C) steps for d distinct lengths
and rows of C tokens, whatever the number of samples (a loop over samples would take seconds per million).
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from veomni.data.packing.order import shuffled

Run = tuple[int, int]  # first row, number of rows


@dataclass(frozen=True)
class Bins:
    """Sample indices row after row, int64 ``[samples]``, and where each row starts, int64 ``[rows + 1]``."""

    samples: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        return self.samples[self.offsets[row] : self.offsets[row + 1]]


def epoch_bins(lengths: NDArray[np.int64], capacity: int, *, pack: bool, shuffle: bool, seed: int, epoch: int) -> Bins:
    """Return the rows of one epoch, in the order they are read; their number depends on ``lengths`` alone.

    No length is above ``capacity``, the tokens of a row. Without ``pack`` each sample has its own. With ``shuffle`` the
    order of samples and rows is drawn from (seed, epoch); otherwise rows come in the order of their first sample.
    """
    count = len(lengths)
    order = shuffled(count, "samples", seed, epoch) if shuffle else np.arange(count)
    row_of = best_fit_decreasing(lengths[order], capacity) if pack else np.arange(count)
    by_row = np.argsort(row_of, kind="stable")  # rows in turn, and samples in ``order`` within each
    sizes = np.bincount(row_of) if count else np.zeros(0, np.int64)
    starts = np.cumsum(sizes) - sizes
    reading = shuffled(len(sizes), "rows", seed, epoch) if shuffle else np.argsort(by_row[starts], kind="stable")
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[reading])])
    places = np.arange(count) + np.repeat(starts[reading] - offsets[:-1], sizes[reading])
    return Bins(order[by_row[places]], offsets)


def best_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Return the row of every sample of 1 to ``capacity`` tokens; equal lengths are placed in the order given."""
    rows, counts, longest = _Rows(capacity), np.bincount(lengths), lengths.max(initial=0)
    for length in np.flatnonzero(counts)[::-1].tolist():
        count = int(counts[length])
        while count:
            count -= rows.place(length, count)
    longest_first = np.argsort((longest - lengths).astype(np.min_scalar_type(longest)), kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    row_of[longest_first] = rows.placed()
    return row_of


class _Rows:
    """Rows by free space, filled with samples from the longest down."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._rows = 0
        self._placed: list[tuple[int, int, int]] = []  # first row, samples, of which so many share a row
        self._spaces: list[int] = []  # sorted, those that some row has free
        self._runs: dict[int, list[Run]] = {}

    def place(self, length: int, count: int) -> int:
        """Place at least one of ``count`` samples of ``length`` where they fit best, and return how many."""
        (first, available), space = self._take(length, count)
        per_row = space // length
        full = min(available, count // per_row)
        rest = count - full * per_row if full < available else 0
        for rows, together in ((full, per_row), (min(rest, 1), rest), (available - full - min(rest, 1), 0)):
            if rows and together:
                self._placed.append((first, rows * together, together))
            self._keep((first, rows), space - together * length)
            first += rows
        return full * per_row + rest

    def placed(self) -> NDArray[np.int64]:
        """Return the row of every sample, in the order they were placed."""
        first, samples, per_row = np.array(self._placed, np.int64).reshape(-1, 3).T
        ends = np.cumsum(samples)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - samples, samples)
        return np.repeat(first, samples) + within // np.repeat(per_row, samples)

    def _take(self, length: int, count: int) -> tuple[Run, int]:
        """Return the rows with the least space for ``length``, or new ones for all samples, and their space."""
        at = bisect_left(self._spaces, length)
        if at == len(self._spaces):
            run = (self._rows, -(-count // (self.capacity // length)))
            self._rows += run[1]
            return run, self.capacity
        space = self._spaces[at]
        run = self._runs[space].pop()
        if not self._runs[space]:
            del self._spaces[at], self._runs[space]
        return run, space

    def _keep(self, run: Run, space: int) -> None:
        if not (run[1] and space):
            return
        if space not in self._runs:
            self._runs[space] = []
            insort(self._spaces, space)
        self._runs[space].append(run)
