"""Weighted means over ranks equal those in one piece."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from veomni.metrics.mean import WeightedMean
from veomni.testing.ranks import run_ranks

COUNTS = [7, 0, 100_003, 1, 12, 5, 900]  # batches of very different sizes; rank 0 gets the even ones
GROUPS = [0, 0, 2, 1, 1, 2, 0]


def batches() -> list[tuple[torch.Tensor, int, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(count, generator=generator, dtype=torch.float64) * 9 for count in COUNTS]
    return [(part.mean(), len(part), torch.tensor([group])) for part, group in zip(parts, GROUPS, strict=True)]


def mean_of(mine, groups=3, **options) -> list[float]:
    metric = WeightedMean(groups, **options)
    for mean, weight, group in mine:
        metric.update(mean, weight, group if groups > 1 else None)
    found = metric.compute()
    assert found.dtype == torch.float64
    return found.tolist()


def on_a_rank(uneven: bool) -> list[float]:
    everything = batches()
    mine = everything[dist.get_rank() :: 2] if uneven else everything if dist.get_rank() else []
    return mean_of(mine, process_group=dist.group.WORLD)


def test_the_definition() -> None:
    sums = [float(mean) * count if count else 0.0 for mean, count, _ in batches()]
    expected = [math.fsum(sums) / sum(COUNTS)]
    for group in range(3):
        mine = [index for index, each in enumerate(GROUPS) if each == group]
        expected.append(math.fsum(sums[index] for index in mine) / sum(COUNTS[index] for index in mine))
    assert mean_of(batches()) == pytest.approx(expected, rel=1e-14)
    assert mean_of(batches(), groups=1) == pytest.approx([expected[0]] * 2, rel=1e-14)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("uneven", [True, False])
def test_two_uneven_ranks_equal_one(uneven) -> None:
    for result in run_ranks(on_a_rank, 2, uneven):
        assert result == pytest.approx(mean_of(batches()), rel=1e-14)


def test_float32_numbers_are_summed_in_float64() -> None:
    metric = WeightedMean()
    metric.update(2.0**24, 1)
    for _ in range(8):
        metric.update(torch.tensor(1.0), 1)  # each is lost when added to 2**24 in float32
    assert float(metric.compute()[0]) * 9 == 2.0**24 + 8


def test_weights_are_float64() -> None:
    metric = WeightedMean()
    metric.update(1.0, 0.1)
    metric.update(3.0, 0.2)
    assert float(metric.compute()[0]) == pytest.approx(0.7 / 0.3, rel=1e-15)


def test_the_mean_of_nothing_does_not_spoil_the_sum() -> None:
    metric = WeightedMean()
    metric.update(torch.tensor([math.nan, 3.0]), torch.tensor([0, 2]), torch.tensor([0, 0]))
    assert metric.compute().tolist() == [3.0, 3.0]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_is_not_a_number() -> None:
    assert WeightedMean(2).compute().isnan().all()


def test_torchmetrics_is_imported_when_it_is_needed() -> None:
    program = (
        "import sys, veomni.metrics, veomni.loop.evaluation; assert 'torchmetrics' not in sys.modules; "
        "assert 'matplotlib' not in sys.modules; import veomni.metrics.mean; assert 'torchmetrics' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
