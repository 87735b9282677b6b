"""Batches in which ranks lack images, videos or audio: no rank waits, and every gradient is that of one process."""

from __future__ import annotations

import pytest

from tests.models.multimodal import FAMILIES
from tests.pairwise import pairs_of
from tests.strategies.media import MATRIX, Case, check, step_of, truth, weights_of
from veomni.testing.ranks import RankFailed, run_ranks

PAIRS = [Case(**case) for case in MATRIX.cover()]
ALONE, SPREAD = (Case("ddp", "one rank has all", balance=balance) for balance in (False, True))
# Replicated training waits for a gradient of every parameter: those that nothing reads are frozen.
OTHERS = [
    *(Case("fsdp2", step_of(name), name, balance=True) for name in FAMILIES),
    *(Case("ulysses", step_of(name), name, weighted=True) for name in FAMILIES),
    *(Case("ddp", step_of(name), name) for name in ("qwen2_5_omni_thinker", "llava", "gemma3", "qwen2_audio")),
    *(Case("ring", step_of(name), name) for name in ("qwen3_omni_moe_thinker", "glm4v")),
    *(Case("experts", step_of(name), name) for name in ("qwen3_vl_moe", "qwen3_omni_moe_thinker")),
    *(Case(name, step_of("llava"), "llava", "all but the projector") for name in ("fsdp1", "fsdp2", "ulysses ddp")),
    Case("ulysses", step_of("qwen2_5_omni_thinker"), "qwen2_5_omni_thinker", balance=True),
]
CASES = list(dict.fromkeys([ALONE, SPREAD, *PAIRS, *OTHERS]))


@pytest.fixture(scope="module", autouse=True)
def _written():
    for name in FAMILIES:
        weights_of(name)  # before the ranks are forked


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_gradient_is_that_of_one_process(case, outcomes):
    check(case, outcomes(case))


def test_every_pair_of_options_is_in_it():
    possible = {pair for pair in MATRIX.pairs() if MATRIX.case_with(dict(pair))}
    assert {pair for case in MATRIX.cover() for pair in pairs_of(case)} == possible


def test_the_work_is_spread(outcomes):
    """288 patches of images on one rank, none on the other: each encodes half, and small dummies beside."""
    alone, spread = ([patches for _, _, patches in outcomes(case)] for case in (ALONE, SPREAD))
    assert alone[0] >= 288 > 40 > alone[1]
    assert max(spread) <= 0.65 * alone[0]
    assert min(spread) >= 0.4 * alone[0]


def test_a_mask_that_a_ring_cannot_split_is_rejected():
    """Gemma 3 lets the tokens of an image see each other, by a mask that it makes itself."""
    with pytest.raises(RankFailed, match="adds a rule to its mask"):
        run_ranks(Case("ring", step_of("gemma3"), "gemma3").run, 4, init=False)


def test_the_truth_trains_encoders():
    _, gradients = truth("qwen3_vl", "images here, videos there", "nothing", False)
    assert any("visual" in name and gradient.any() for name, gradient in gradients.items())
