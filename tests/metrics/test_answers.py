"""Answers that are right to the last token, over ranks as in one piece."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from veomni.metrics import AnswerAccuracy
from veomni.testing.ranks import run_ranks

WRONG = [0, 1, 0, 3, 0, 0, 2]
LEARNED = [2, 4, 0, 3, 1, 5, 2]
GROUP = [0, 0, 0, 1, 1, 1, 2]


def score(rank: int = 0, size: int = 1, groups: int = 3, **options) -> tuple[float, list[float]]:
    metric = AnswerAccuracy(groups, **options)
    for number in range(rank, len(WRONG), size):
        wrong, learned, group = (torch.tensor(values[number : number + 1]) for values in (WRONG, LEARNED, GROUP))
        metric.update(wrong, learned, group if groups > 1 else None)
    found = metric.compute()
    return float(found["accuracy"]), found["by_group"].reshape(-1).tolist()


def test_a_document_counts_if_it_has_an_answer_and_all_of_it_is_right():
    accuracy, by_group = score()
    assert accuracy == pytest.approx(3 / 6)
    assert by_group == pytest.approx([1 / 2, 2 / 3, 0.0])
    assert score(groups=1)[0] == pytest.approx(3 / 6)


def on_a_rank() -> tuple[float, list[float]]:
    return score(dist.get_rank(), dist.get_world_size(), process_group=dist.group.WORLD)


def test_ranks_add_up():
    assert run_ranks(on_a_rank, 2) == [score()] * 2


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_is_not_a_number():
    found = AnswerAccuracy(2).compute()
    assert found["accuracy"].isnan()
    assert found["by_group"].isnan().all()
