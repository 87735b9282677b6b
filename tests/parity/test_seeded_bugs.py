"""Break the library on purpose, one classic way at a time: the parity check must notice every one."""

from __future__ import annotations

import pytest

from tests.parity.bugs import BUGS
from tests.parity.matrix import CASES
from tests.parity.test_matrix import truth
from veomni.testing.oracle import check


@pytest.mark.parametrize("case", BUGS, ids=str)
def test_bug_is_caught(case, outcomes):
    found = outcomes(case)
    with pytest.raises(AssertionError):
        check_all(found, truth(case.step.model, False))


def check_all(found, expected):
    for outcome in found:
        check(outcome, expected, 1e-12)


def test_there_are_enough_bugs_in_steps_that_pass_without():
    assert len(BUGS) >= 21
    assert {bug.step for bug in BUGS} <= set(CASES)
