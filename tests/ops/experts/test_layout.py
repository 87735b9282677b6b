"""Which activation an experts module is found to compute."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops.experts.modules import experts
from veomni.ops.experts.activation import SwiGLU
from veomni.ops.experts.layout import activation_of

FOUND = {
    "qwen3_moe": SwiGLU(),
    "lfm2_moe": SwiGLU(),
    "beam": SwiGLU(),
    "gpt_oss": SwiGLU(1.702, 2.5, 1.0, interleaved=True),
    "openai_privacy_filter": SwiGLU(1.702, 2.5, 1.0),
    "minimax_m3_vl": SwiGLU(1.702, 2.5, 1.0),
    "deepseek_v4": SwiGLU(1.0, 2.5),
    "gemma4": None,
    "inkling2": None,
    "nemotron_h": None,
}


@pytest.mark.parametrize("name", FOUND)
def test_the_activation_is_found(name):
    module = experts(name)
    expected = FOUND[name]
    if expected is not None and math.isfinite(expected.limit):
        expected = expected._replace(limit=module.limit)  # transformers 5.17 knows one only, whatever its configuration
    assert activation_of(module) == expected


def test_a_limit_that_has_no_name_is_not_overlooked():
    module = experts("qwen3_moe")
    module._apply_gate = lambda gate_up: module.act_fn(gate_up.chunk(2, -1)[0].clamp(max=5e3)) * gate_up.chunk(2, -1)[1]
    assert activation_of(module) is None


def test_an_infinite_limit_clamps_nothing():
    assert activation_of(experts("deepseek_v4", swiglu_limit=math.inf)) == SwiGLU()


def test_modules_on_the_meta_device_are_tried_too():
    module = experts("gpt_oss", torch.float32).to("meta")
    assert activation_of(module) == FOUND["gpt_oss"]._replace(limit=module.limit)
