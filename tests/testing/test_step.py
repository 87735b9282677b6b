"""What authors of plugins prove theirs with: it passes what is exact, and fails what is not."""

from __future__ import annotations

import pytest

from tests.models.tiny import tiny_config
from tests.parity.bugs import BUGS
from veomni.strategies import DDP
from veomni.testing.seams import replaced
from veomni.testing.step import prove


def test_an_exact_strategy_passes():
    prove(tiny_config("llama"), DDP, 2, accumulation=3)


@pytest.mark.parametrize(
    ("bug", "message"), [("gradient_doubled", "gradients off by more than 1e-12"), ("loss_not_reduced", "^loss ")]
)
def test_a_wrong_one_fails_by_what_is_wrong(bug, message):
    seeded = next(one for one in BUGS if str(one) == bug)
    with replaced(seeded.seam, seeded.around), pytest.raises(AssertionError, match=message):
        prove(tiny_config("llama"), DDP, 2)
