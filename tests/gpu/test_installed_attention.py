"""Every attention that is installed, in bf16 with heads of a common size, on whole rows and on rows that GPUs share."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest

from tests.gpu.devices import KIND, LAUNCHER, RANKS, on_devices, outcome_of
from tests.parity.layouts import LAYOUTS, one_step, oracle
from veomni.ops.attention.backends import ATTENTION
from veomni.testing.oracle import BOUNDS, check, relative_error

HEADS = {"head_dim": 64}
PACKAGES = {
    "flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}  # fmt: skip


def runs_here(name: str) -> bool:
    backend, package = ATTENTION.get(name), PACKAGES.get(name)
    parts = [] if package is None else [package.partition(".")[0], package]
    return (backend.devices is None or KIND in backend.devices) and all(find_spec(part) for part in parts)


CASES = [
    (name, layout)
    for name in ATTENTION
    if RANKS and runs_here(name)
    for layout in ("single", "ulysses2_fsdp2")
    if LAYOUTS[layout][0] in RANKS
]


@pytest.fixture(scope="module")
def steps():
    device = KIND if KIND == "cpu" else f"{KIND}:0"
    found = {"truth": on_devices([partial(oracle, "qwen3", device, **HEADS)], 1)[0]}
    for ranks in RANKS:
        same = [case for case in CASES if LAYOUTS[case[1]][0] == ranks]
        options = {"precision": "bf16", "accumulation": 3, "changes": HEADS, **LAUNCHER}
        jobs = [partial(one_step, "qwen3", layout, attention=name, **options) for name, layout in same]
        found |= zip(same, on_devices(jobs, ranks), strict=True)
    return found


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_step_is_the_oracles(case, steps, record_property):
    (truth,) = outcome_of(steps["truth"])
    record_property("precision", "bf16")
    for outcome in outcome_of(steps[case]):
        errors = [relative_error(outcome.gradients[name], gradient) for name, gradient in truth.gradients.items()]
        record_property("error", max(errors))
        check(outcome, truth, BOUNDS["bf16"])
