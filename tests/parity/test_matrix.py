"""Every pair of layout, model and option reproduces the float64 oracle: loss, norm, each gradient, and clipping."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from tests.models.tiny import tiny_config
from tests.pairwise import pairs_of
from tests.parity.matrix import CASES, MATRIX, MAX_NORM, plain
from veomni.testing.documents import global_rows
from veomni.testing.oracle import Truth, check, truth_of
from veomni.testing.ranks import RankFailed, run_cases


@functools.cache
def truth(model: str, weighted: bool) -> Truth:
    config = tiny_config(model)
    return truth_of(config, global_rows(config.vocab_size, weighted=weighted))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_step_is_the_oracles(case, outcomes):
    expected = truth(case.model, case.weighted)
    for outcome in outcomes(case):
        check(outcome, expected, case.bound)
        factor = MAX_NORM / (outcome.grad_norm + 1e-6)
        for name, gradient in outcome.gradients.items():
            assert (outcome.clipped[name] - gradient * factor).norm() <= 1e-6 * gradient.norm() * factor, name


def test_every_pair_is_in_it():
    covered = {pair for case in CASES for pair in pairs_of(vars(case))}
    possible = {pair for pair in MATRIX.pairs() if MATRIX.case_with(dict(pair))}
    assert covered == possible
    assert len(possible) > 900
    assert len(CASES) <= 150


def test_sums_in_bf16_are_bf16():
    reduced = [replace(plain(name, 2), precision="bf16_sums", accumulation=1) for name in ("ddp", "fsdp1", "fsdp2")]
    cases = [*reduced, replace(reduced[0], precision="bf16")]
    for case, found in zip(cases, run_cases([one.run for one in cases], 2, init=False), strict=True):
        assert not isinstance(found, RankFailed), found
        exact = [torch.equal(grad, grad.bfloat16().float()) for grad in found[0].gradients.values()]
        assert all(exact) if case in reduced else not any(exact), case
