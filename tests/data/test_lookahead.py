from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from veomni.data.packing.lookahead import LookAhead


@dataclass(frozen=True)
class Piece:
    name: int
    length: int
    media: int = 0


def row_one_by_one(waiting, capacity, bound):
    """The same rule, looking at every sample each time."""
    row = [waiting.pop(0)]
    free, media = capacity - row[0].length, None if bound is None else max(0, bound - row[0].media)
    while True:
        fitting = [piece for piece in waiting if piece.length <= free and (media is None or piece.media <= media)]
        if not fitting:
            return row
        best = max(fitting, key=lambda piece: piece.length)  # the first, so the oldest, of equal ones
        waiting.remove(best)
        row.append(best)
        free -= best.length
        media = None if media is None else media - best.media


@pytest.mark.parametrize("bound", [None, 12])
@pytest.mark.parametrize("seed", range(20))
def test_rows_are_those_of_the_rule(seed, bound):
    rng = np.random.default_rng(seed)
    ahead, waiting, name = LookAhead(40, bound), [], 0
    for _ in range(60):
        while len(waiting) < 15:
            piece = Piece(name, int(rng.integers(1, 41)), int(rng.integers(0, 9)))
            ahead.add(piece)
            waiting.append(piece)
            name += 1
        assert ahead.take_row() == row_one_by_one(waiting, 40, bound)
        assert list(ahead) == waiting


def test_nothing_waits_for_ever():
    ahead, taken = LookAhead(10), set()
    ahead.add(Piece(0, 9))
    for name in range(1, 40):
        ahead.add(Piece(name, 10))
    for _ in range(3):
        taken |= {piece.name for piece in ahead.take_row()}
    assert 0 in taken


def test_unpacked_rows_come_as_they_came():
    ahead = LookAhead(10, pack=False)
    for name in range(5):
        ahead.add(Piece(name, 1 + name))
    assert [ahead.take_row()[0].name for _ in range(5)] == list(range(5))


@pytest.mark.parametrize(("capacity", "least"), [(4096, 0.995), (8192, 0.998), (32768, 0.999)])
def test_rows_of_log_normal_lengths_are_full(capacity, least):
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(600), 1.0, 30_000).astype(int), 1, capacity).tolist()
    ahead, used, rows = LookAhead(capacity), 0, 0
    for number, length in enumerate(lengths):
        ahead.add(Piece(number, length))
        if len(ahead) == 256:
            used += sum(piece.length for piece in ahead.take_row())
            rows += 1
    assert used / (rows * capacity) >= least
