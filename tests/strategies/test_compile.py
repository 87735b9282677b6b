"""Compiled blocks: every block runs a compiled graph, and gradients stay what they were."""

from __future__ import annotations

import logging

import pytest

from tests.parity.layouts import LAYOUTS, one_step, oracle
from veomni.testing.oracle import BOUNDS, check
from veomni.testing.ranks import run_ranks


def compiled_step(model_name, layout, precision, compile="inductor", **options):
    from torch._dynamo.utils import counters

    counters.clear()  # this process is forked from one that may have compiled in other tests
    outcome = one_step(model_name, layout, precision=precision, compile=compile, **options)
    return outcome, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.mark.parametrize(
    ("model_name", "layout", "options"),
    [
        ("llama", "fsdp2_2", {"accumulation": 3}),
        ("qwen3", "ddp2", {"recompute": "selective", "compile": "aot_eager"}),
        ("qwen3", "ulysses2_fsdp2", {"recompute": "full", "compile": "aot_eager"}),
        ("gpt_oss", "ulysses2_ddp", {"recompute": "selective", "compile": "aot_eager"}),
        ("gpt_oss", "async2_ddp", {"recompute": "full", "compile": "aot_eager"}),
        ("qwen3", "async2_fsdp1", {"recompute": "selective", "compile": "aot_eager"}),
        ("gemma3_text", "ring2_ddp", {"recompute": "full", "compile": "aot_eager"}),
        ("qwen3", "ring2_fsdp1", {"recompute": "selective", "compile": "aot_eager"}),
    ],
)
def test_gradients_of_compiled_blocks_are_those_of_the_oracle(model_name, layout, options):
    """Rows split over ranks, recomputed, in compiled blocks failed as three where each two of them passed."""
    ranks = LAYOUTS[layout][0]
    for outcome, graphs, breaks in run_ranks(compiled_step, ranks, model_name, layout, "fp32", init=False, **options):
        check(outcome, oracle(model_name), BOUNDS["fp32"])
        assert graphs >= 1
        assert not breaks


@pytest.mark.parametrize(("model_name", "layout"), [("qwen2_moe", "ep2_chunks"), ("deepseek_v3", "ep2_fsdp1")])
def test_compiled_blocks_with_experts_on_other_ranks(model_name, layout):
    """Their graphs break where tokens are exchanged, and where shared experts run meanwhile."""
    for outcome, graphs, _ in run_ranks(
        compiled_step, 2, model_name, layout, "fp32", "aot_eager", accumulation=3, init=False, timeout=240
    ):
        check(outcome, oracle(model_name), BOUNDS["fp32"])
        assert graphs >= 2


def logged_step(*arguments):
    said: list[str] = []
    logging.getLogger("veomni.strategies.transforms.blocks").addFilter(
        lambda record: bool(said.append(record.getMessage())) or True
    )
    return *compiled_step(*arguments), said


def test_fp64_says_that_it_stays_uncompiled():
    ((outcome, graphs, _, said),) = run_ranks(logged_step, 1, "llama", "single", "fp64", init=False)
    check(outcome, oracle("llama"), BOUNDS["fp64"])
    assert graphs == 0
    assert [line.split(":")[0] for line in said] == ["Compile has no effect in fp64"]
