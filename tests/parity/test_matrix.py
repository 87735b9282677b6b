"""Every pair of layout, model and option reproduces the float64 oracle: loss, norm, each gradient, and clipping."""

from __future__ import annotations

import functools

import pytest

from tests.models.tiny import tiny_config
from tests.pairwise import pairs_of
from tests.parity.matrix import CASES, MATRIX, MAX_NORM
from veomni.testing.documents import global_rows
from veomni.testing.oracle import Truth, check, truth_of


@functools.cache
def truth(model: str, weighted: bool) -> Truth:
    config = tiny_config(model)
    return truth_of(config, global_rows(config.vocab_size, weighted=weighted))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_step_is_the_oracles(case, outcomes):
    expected = truth(case.model, case.weighted)
    for outcome in outcomes(case):
        check(outcome, expected, case.bound)
        factor = MAX_NORM / (outcome.grad_norm + 1e-6)
        for name, gradient in outcome.gradients.items():
            assert (outcome.clipped[name] - gradient * factor).norm() <= 1e-6 * gradient.norm() * factor, name


def test_every_pair_is_in_it():
    covered = {pair for case in CASES for pair in pairs_of(vars(case))}
    possible = {pair for pair in MATRIX.pairs() if MATRIX.case_with(dict(pair))}
    assert covered == possible
    assert len(possible) > 900
    assert len(CASES) <= 150
