"""The plan that spreads encoders' work over ranks is good, and the same on all of them."""

from __future__ import annotations

import itertools
import random

import torch

from veomni.strategies.transforms.encoder_balance import assign


def test_plans_are_within_a_third_of_the_best():
    generator = random.Random(0)
    for _ in range(60):
        costs = [[generator.randint(1, 30) for _ in range(generator.randint(0, 3))] for _ in range(3)]
        items = list(itertools.chain(*costs))
        places = list(itertools.chain(*assign(costs)))
        worst_load = max(sum(c for c, p in zip(items, places, strict=True) if p == rank) for rank in range(3))
        best = min(
            max(sum(c for c, p in zip(items, other, strict=True) if p == rank) for rank in range(3))
            for other in itertools.product(range(3), repeat=len(items))
        )  # fmt: skip
        assert worst_load <= best * 4 / 3 or not items


def test_an_even_load_stays_at_home():
    assert assign([[9, 1], [9, 1], [9, 1]]) == [[0, 0], [1, 1], [2, 2]]


def test_plans_do_not_depend_on_who_asks():
    costs = [[5, 5, 5, 5], [], [1]]
    assert assign(costs) == assign([list(own) for own in costs])
    assert torch.tensor(sum(len(own) for own in assign(costs))) == 5
