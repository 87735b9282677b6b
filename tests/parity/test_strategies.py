"""Every strategy reproduces the single-process float64 oracle: loss, norm and each parameter's gradient."""

from __future__ import annotations

import functools

import pytest

from tests.parity.layouts import LAYOUTS, one_step, oracle
from veomni.testing.oracle import BOUNDS, Truth, check
from veomni.testing.ranks import run_ranks

ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "qwen3_moe", "gpt_oss"]
MULTI_RANK = ["ddp2", "fsdp1_full", "fsdp2_2"]
OVERLAPPED = ["async2_ddp", "async4_fsdp2"]
SPLIT_ROWS = ["ulysses2_ddp", "ulysses4_fsdp1", "ulysses4_fsdp2", *OVERLAPPED]


@functools.cache
def truth(name: str) -> Truth:
    return oracle(name)


def run(model: str, layout: str, **options) -> None:
    precision = options.get("precision", "fp64")
    for outcome in run_ranks(one_step, LAYOUTS[layout][0], model, layout, init=False, **options):
        check(outcome, truth(model), BOUNDS[precision])


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout(layout, accumulation):
    run("qwen3", layout, accumulation=accumulation)


@pytest.mark.parametrize("layout", SPLIT_ROWS)
@pytest.mark.parametrize("model", [name for name in ARCHITECTURES if name != "qwen3"])
def test_every_architecture_on_split_rows(model, layout):
    run(model, layout, accumulation=3)


@pytest.mark.parametrize("layout", ["ring4_fsdp2", "ring2_ulysses2_fsdp2"])
@pytest.mark.parametrize("model", ["llama", "gemma3_text", "qwen3_moe"])
def test_every_architecture_on_a_ring(model, layout):
    run(model, layout, accumulation=3)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("layout", MULTI_RANK)
@pytest.mark.parametrize("model", [name for name in ARCHITECTURES if name != "qwen3"])
def test_every_architecture(model, layout, accumulation):
    run(model, layout, accumulation=accumulation)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["single", *MULTI_RANK, "hsdp_2x2", "ulysses2_ddp", "ulysses2_fsdp2", "ring2_ddp"])
def test_lower_precisions(layout, precision):
    run("qwen3", layout, precision=precision, accumulation=3)


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize(
    "layout", ["single", *MULTI_RANK, "ulysses2_fsdp1", "ulysses2_fsdp2", "ring2_fsdp1", *OVERLAPPED]
)
def test_recomputation_changes_nothing(layout, recompute):
    run("qwen3", layout, recompute=recompute, accumulation=3)


@pytest.mark.parametrize("layout", ["single", *MULTI_RANK, "hsdp_2x2", "fsdp1_hybrid"])
def test_clipping_scales_every_gradient_once(layout):
    expected = truth("llama")
    for outcome in run_ranks(one_step, LAYOUTS[layout][0], "llama", layout, init=False, max_norm=0.01):
        factor = 0.01 / (expected.grad_norm + 1e-6)
        for name, gradient in expected.gradients.items():
            assert (outcome.clipped[name] - gradient * factor).norm() <= 1e-11 * gradient.norm() * factor, name
