"""The formulas of benchmarks/scaling.py give the bytes that a step's collectives carry, and time grows with them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.scaling import (
    EXCHANGE,
    GATHER,
    REDUCE,
    Layout,
    Message,
    counted,
    messages,
    seconds_of,
    totals,
)
from tests.models.tiny import tiny_config
from veomni.models import build_model
from veomni.testing.ranks import run_ranks


def formula(name: str, layout: Layout) -> dict[str, int]:
    return totals(messages(build_model(tiny_config(name), weights="random"), layout))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", Layout(4, rows=2, micro_batches=2)),  # embedding and head are units: gathered once each
        ("qwen3", Layout(8, ulysses=2, recompute=True)),
        ("qwen3_moe", Layout(4, rows=2, experts=2, fixed=True)),
        ("qwen3_moe", Layout(4, experts=4, fixed=True, recompute=True)),
    ],
    ids=["dense", "ulysses", "experts", "experts_recomputed"],
)
def test_a_step_sends_the_bytes_of_the_formula(name, layout):
    (found,) = run_ranks(counted, 1, tiny_config(name), layout, init=False)
    assert found == formula(name, layout)


def test_bytes_follow_the_layout():
    layout = Layout(4, micro_batches=3)
    assert formula("llama", replace(layout, reduce=2))[REDUCE] * 2 == formula("llama", layout)[REDUCE]
    assert formula("llama", replace(layout, micro_batches=1))[GATHER] * 3 == formula("llama", layout)[GATHER]
    assert formula("llama", replace(layout, world=1)) == {}


RATES = {"gpus": 4, "seconds": {name: [(2**14, 1e-5), (2**30, 5e-3)] for name in (GATHER, REDUCE, EXCHANGE)}}


def test_times_are_those_measured_and_then_the_networks():
    assert seconds_of(Message(GATHER, 2**30, 4), RATES, 40.0) == pytest.approx(5e-3)
    assert seconds_of(Message(GATHER, 2**31, 4), RATES, 40.0) == pytest.approx(1e-2)
    two_hosts = seconds_of(Message(GATHER, 2**30, 16), RATES, 1.0)
    assert two_hosts == pytest.approx(2**30 / 2 / 8e9)  # half of it comes from the other host, through eight cards
