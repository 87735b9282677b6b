"""Float8 on GPUs: its products are those that it emulates, and its step is the oracle's, to the error of the casts."""

from __future__ import annotations

from functools import partial

import pytest

from tests.gpu.devices import KIND, LAUNCHER, TORCHAO, on_devices, on_gpus, outcome_of
from tests.models.tiny import tiny_config
from tests.parity.layouts import oracle
from veomni.strategies import FSDP2, ActivationCheckpointing, Compile, Float8
from veomni.testing.oracle import check, relative_error
from veomni.testing.step import train_step

pytestmark = [on_gpus, pytest.mark.skipif(not TORCHAO, reason="needs torchao")]

BESIDE = {"plain": (), "compiled": (Compile,), "selective": (partial(ActivationCheckpointing, "selective"), Compile)}


def step(recipe, beside, emulate):
    strategies = (FSDP2, partial(Float8, recipe, emulate=emulate or KIND == "cpu"), *BESIDE[beside])
    return train_step(tiny_config("llama"), lambda: [each() for each in strategies], precision="bf16", **LAUNCHER)


def test_steps_in_float8_are_those_it_emulates_and_near_the_oracle():
    """Of an odd number of tokens, so the backward pads. A sum in another order rounds some operands otherwise."""
    recipes = "tensorwise", "rowwise"
    cases = [(recipe, "plain", True) for recipe in recipes]
    cases += [(recipe, beside, False) for recipe in recipes for beside in BESIDE]
    outcomes = on_devices([partial(step, *case) for case in cases], 1)
    found = {case: outcome_of(outcome)[0] for case, outcome in zip(cases, outcomes, strict=True)}
    device = KIND if KIND == "cpu" else f"{KIND}:0"  # random weights are those of the kind of device
    ((truth,),) = map(outcome_of, on_devices([partial(oracle, "llama", device)], 1))
    for (recipe, beside, _), outcome in found.items():
        check(outcome, truth, 0.15)
        emulated = found[recipe, "plain", True].gradients
        errors = {name: relative_error(each, emulated[name]) for name, each in outcome.gradients.items()}
        assert max(errors.values()) < 0.1, (recipe, beside, errors)
