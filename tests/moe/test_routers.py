"""Routers are found and understood in the models that transformers builds, without touching them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.models.any_tiny import any_tiny_config
from tests.models.tiny import tiny_config
from veomni.moe import find_routers
from veomni.moe.router_hooks import hooked_routers
from veomni.moe.routers import RouterHook
from veomni.moe.scoring import Scoring

SOFTMAX = Scoring("softmax", normalized=False, scale=1.0)
SHARES = Scoring("softmax", normalized=True, scale=1.0)
BIAS = "e_score_correction_bias"
UNDERSTOOD = {
    "qwen2_moe": (2, SOFTMAX, None),
    "qwen3_moe": (2, SOFTMAX, None),
    "mixtral": (2, SHARES, None),
    "gpt_oss": (2, SHARES, None),
    "deepseek_v3": (1, Scoring("sigmoid", normalized=True, scale=2.5), ("gate", BIAS)),
    "glm4_moe": (1, Scoring("sigmoid", normalized=True, scale=1.0), ("gate", BIAS)),
    "qwen3_next": (4, SHARES, None),
}
ANY = {
    "olmoe": (2, SOFTMAX, None),
    "minimax": (2, SHARES, None),
    "minimax_m2": (
        2,
        Scoring("sigmoid", normalized=True, scale=1.0),
        ("mlp", BIAS),
    ),  # of the block
    "ernie4_5_moe": (1, SHARES, ("moe_statics", BIAS)),  # a parameter that is not trained
    "phimoe": (2, None, None),
}


def build(config, automodel=AutoModelForCausalLM):
    with torch.device("meta"):
        return automodel.from_config(config)


def check(model, expected) -> None:
    count, scoring, bias = expected
    found = find_routers(model)
    assert not found.unreadable
    assert len(found.readable) == count
    names = {id(module): name for name, module in model.named_modules()}
    for router in found.readable:
        assert model.get_submodule(router.name) is router.module
        assert (router.experts, router.top_k) == (4, 2)
        assert router.scoring == scoring
        assert router.balance == ("softmax" if scoring is None else scoring.function)
        where = router.bias and (names[id(router.bias[0])].rpartition(".")[2], router.bias[1])
        assert where == bias


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_text_models(name):
    check(build(tiny_config(name)), UNDERSTOOD[name])


@pytest.mark.parametrize("name", ANY)
def test_more_text_models(name):
    check(build(any_tiny_config(name)), ANY[name])


def test_the_text_side_of_a_vision_language_model():
    check(build(tiny_config("qwen3_vl_moe"), AutoModelForImageTextToText), (2, SHARES, None))


@pytest.mark.parametrize("name", ["llama4_text", "zaya"])  # no choice is given out; a choice is taken back
def test_routers_that_cannot_be_read_are_named(name):
    found = find_routers(build(any_tiny_config(name)))
    assert not found.readable
    assert found.unreadable


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dense_models_have_none(name):
    found = find_routers(build(tiny_config(name)))
    assert found.readable == found.unreadable == ()


def test_looking_changes_nothing():
    model = AutoModelForCausalLM.from_config(tiny_config("deepseek_v3"))
    fired = []
    for module in model.modules():
        module.register_forward_hook(lambda *args: fired.append(args))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    find_routers(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert not fired
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_hooking_twice_is_hooking_once():
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    observed = Observe()
    with hooked_routers(model) as outer, hooked_routers(model) as inner:
        assert inner.readable[0] is outer.readable[0]
        inner.readable[0].hooks.append(observed)
        model(input_ids=torch.arange(6)[None])
    model(input_ids=torch.arange(6)[None])
    assert len(observed) == 1
    assert [tuple(part.shape) for part in vars(observed[0]).values()] == [(6, 4), (6, 2), (6, 2)]


def test_a_copy_has_hooks_of_its_own():
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    observed = [Observe(), Observe()]
    with hooked_routers(model) as routers:
        routers.readable[0].hooks.append(observed[0])
        copy = deepcopy(model)
        with hooked_routers(copy) as others:
            others.readable[0].hooks.append(observed[1])
            copy(input_ids=torch.arange(6)[None])
    assert [len(hook) for hook in observed] == [0, 1]


class Observe(RouterHook, list):
    def observe(self, router, decision, training):
        self.append(decision)
