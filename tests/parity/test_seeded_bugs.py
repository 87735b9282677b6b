"""Break the library on purpose, one classic way at a time: the parity check must notice every one."""

from __future__ import annotations

import pytest

from tests.parity.bugs import BUGS
from tests.parity.layouts import EXPERT_LAYOUTS, LAYOUTS, one_step
from tests.parity.test_strategies import truth
from veomni.testing.oracle import check
from veomni.testing.ranks import run_ranks


def outcomes(layout: str, model: str):
    ranks = (LAYOUTS | EXPERT_LAYOUTS)[layout][0]
    return run_ranks(one_step, ranks, model, layout, init=False, accumulation=3)


def check_all(found, model):
    for outcome in found:
        check(outcome, truth(model), 1e-12)


def test_there_are_enough_bugs():
    assert len(BUGS) >= 12


@pytest.mark.parametrize("name", list(BUGS))
def test_bug_is_caught(name):
    bug = BUGS[name]
    with bug.seeded():
        found = outcomes(bug.layout, bug.model)
    with pytest.raises(AssertionError):
        check_all(found, bug.model)


@pytest.mark.parametrize(("layout", "model"), sorted({(bug.layout, bug.model) for bug in BUGS.values()}))
def test_the_same_run_without_a_bug_passes(layout, model):
    check_all(outcomes(layout, model), model)
