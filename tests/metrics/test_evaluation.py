"""Perplexity over ranks equals perplexity in one piece."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from veomni.metrics import TokenPerplexity
from veomni.testing.ranks import run_ranks

COUNTS = [7, 0, 100_003, 1, 12, 5, 900]  # batches of very different sizes; rank 0 gets the even ones


def batches() -> list[tuple[torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(count, generator=generator, dtype=torch.float64) * 9 for count in COUNTS]
    return [(part.sum(), len(part)) for part in parts]


def evaluate(mine: list[tuple[torch.Tensor, int]], **options) -> tuple[float, float]:
    metric = TokenPerplexity(**options)
    for nll_sum, tokens in mine:
        metric.update(nll_sum, tokens)
    result = metric.compute()
    assert result["loss"].dtype == result["perplexity"].dtype == torch.float64
    return float(result["loss"]), float(result["perplexity"])


def on_a_rank(uneven: bool) -> tuple[float, float]:
    all_batches = batches()
    mine = all_batches[dist.get_rank() :: 2] if uneven else all_batches if dist.get_rank() else []
    return evaluate(mine, process_group=dist.group.WORLD)


def test_the_definition() -> None:
    loss, perplexity = evaluate(batches())
    total = math.fsum(float(nll) for nll, _ in batches())
    assert loss == pytest.approx(total / sum(COUNTS), rel=1e-14)
    assert perplexity == pytest.approx(math.exp(total / sum(COUNTS)), rel=1e-13)


@pytest.mark.parametrize("uneven", [True, False])
def test_two_uneven_ranks_equal_one(uneven) -> None:
    alone = evaluate(batches())
    for result in run_ranks(on_a_rank, 2, uneven):
        assert result == pytest.approx(alone, rel=1e-14)


def test_float32_batches_are_summed_in_float64() -> None:
    metric = TokenPerplexity()
    metric.update(2.0**24, 1)
    for _ in range(8):
        metric.update(torch.tensor(1.0), 1)  # each is lost when added to 2**24 in float32
    assert float(metric.compute()["loss"]) * 9 == 2.0**24 + 8


def test_the_mean_of_no_tokens_does_not_spoil_the_sum() -> None:
    metric = TokenPerplexity()
    metric.update(torch.tensor(math.nan), 0)
    metric.update(3.0, 2)
    assert float(metric.compute()["loss"]) == 1.5


def test_torchmetrics_is_imported_when_the_class_is_asked_for() -> None:
    program = (
        "import sys, veomni.metrics as metrics; assert 'torchmetrics' not in sys.modules; "
        "assert 'matplotlib' not in sys.modules; metrics.TokenPerplexity; assert 'torchmetrics' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
