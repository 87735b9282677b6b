"""Every pair of layout, model and option in each precision, on GPUs: loss, norm and each gradient are the oracle's.

The oracle runs on the same kind of device, whose rotary tables differ from the CPU's in the last bit of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest

from tests.gpu.devices import KIND, LAUNCHER, RANKS, on_devices, outcome_of
from tests.models.tiny import tiny_config
from tests.parity.matrix import MAX_NORM, PRECISIONS, SPARSE, Case, matrix, plain
from tests.together import selected
from veomni.moe import RoutingLog, record_routing
from veomni.testing.documents import global_rows
from veomni.testing.oracle import BOUNDS, Truth, backward_of, check, initial_model, relative_error
from veomni.testing.routing import Choices

CASES = [Case(**case) for precision in PRECISIONS for case in matrix(RANKS, (precision,)).cover()]


def true_step(model: str, weighted: bool) -> tuple[Truth, list[Choices]]:
    """The step, and the experts it chose for each document."""
    config = tiny_config(model)
    device = KIND if KIND == "cpu" else f"{KIND}:0"
    body = initial_model(config, device)
    with record_routing(body) if model in SPARSE else nullcontext(RoutingLog()) as log:
        truth = backward_of(body, global_rows(config.vocab_size, weighted=weighted), device)
    return truth, [{name: experts.cpu() for name, experts in forward.items()} for forward in log.forwards]


@pytest.fixture(scope="module")
def steps(request) -> Callable[[Case], tuple[Truth, list[Any]]]:
    """The truth of a case, and what its ranks came to; all cases of the run at its first use."""
    cases = selected(request.session.items, request.module)
    needed = list(dict.fromkeys((case.model, case.weighted) for case in cases))
    truths = dict(zip(needed, on_devices([partial(true_step, *key) for key in needed], 1), strict=True))
    found = {}
    for ranks in RANKS:
        same = [case for case in cases if case.ranks == ranks]
        found |= zip(same, on_devices([partial(step_of, case, truths) for case in same], ranks), strict=True)
    return lambda case: (outcome_of(truths[case.model, case.weighted])[0][0], outcome_of(found[case]))


def step_of(case: Case, truths: dict[Any, Any]) -> Any:
    """A choice of experts is discrete: where rounding may change it, the oracle's is made again."""
    ((_, choices),) = outcome_of(truths[case.model, case.weighted])
    return case.run(**LAUNCHER, choices=choices if choices and case.precision != "fp64" else None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_step_is_the_oracles(case, steps, record_property):
    truth, outcomes = steps(case)
    record_property("precision", case.precision)
    for outcome in outcomes:
        errors = [relative_error(outcome.gradients[name], gradient) for name, gradient in truth.gradients.items()]
        record_property("error", max(errors))
        check(outcome, truth, case.bound)
        factor = MAX_NORM / (outcome.grad_norm + 1e-6)
        for name, gradient in outcome.gradients.items():
            assert (outcome.clipped[name] - gradient * factor).norm() <= 1e-6 * gradient.norm() * factor, name


def test_experts_of_another_choice_are_not_the_oracles():
    """What is replayed is used: with each token's choice moved by one expert, the step is another."""
    (found,) = on_devices([partial(true_step, "qwen3_moe", False)], 1)
    ((truth, choices),) = outcome_of(found)
    moved = [{name: (experts + 1) % 4 for name, experts in document.items()} for document in choices]
    case = plain("single", 1, "qwen3_moe")
    (found,) = on_devices([partial(case.run, **LAUNCHER, choices=moved)], 1)
    with pytest.raises(AssertionError, match="gradients off"):
        check(outcome_of(found)[0], truth, BOUNDS["bf16"])
