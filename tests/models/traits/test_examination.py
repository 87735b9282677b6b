"""Verdicts on models of full size, from a copy that is shrunk, equal those that the coverage page was measured with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from tests.models.tiny import tiny_config
from veomni.models import build_model
from veomni.models.traits import FusesHead, MissingTraitError, PassesDocuments, SplitsRows, examine_model
from veomni.models.traits.shrink import shrunk_config
from veomni.moe import RouterScoring

PAGE = (Path(__file__).parents[3] / "docs" / "coverage.md").read_text()
EXACT = set(re.findall(r"^\| ([\w.-]+) \| exact", PAGE, re.MULTILINE))
FULL_SIZE = (
    "llama", "qwen3_moe", "gemma3_text", "gemma4_text", "mixtral", "deepseek_v3", "gpt_oss", "smollm3", "cohere2",
    "bert", "electra", "mamba", "minimax", "qwen3_next",
)  # fmt: skip


def full_size(name: str) -> nn.Module:
    return build_model(CONFIG_MAPPING[name](), weights="random")


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_model_of_full_size_is_examined_on_a_small_copy(name):
    model = full_size(name)
    traits = examine_model(model, [PassesDocuments, SplitsRows])
    assert not traits.deferred
    assert all(verdict.ok for verdict in traits.values()) == (name in EXACT), dict(traits)


def test_examining_changes_nothing():
    model = build_model(tiny_config("qwen3_moe"), weights="random")
    before, state = {name: id(tensor) for name, tensor in model.named_parameters()}, torch.get_rng_state()
    attributes = [set(vars(module)) for module in model.modules()]
    config = model.config.to_dict()
    examine_model(model, [PassesDocuments, SplitsRows, FusesHead, RouterScoring])
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_of_every_kind_is_kept():
    config = CONFIG_MAPPING["gemma3_text"]()
    assert len(config.layer_types) == 26
    shrunk = shrunk_config(config)
    assert shrunk.layer_types == ["sliding_attention", "full_attention"]
    assert shrunk.num_hidden_layers == 2


@pytest.mark.parametrize("name", ["gemma4_text", "dots3_note_text"])
def test_layers_with_values_of_their_own_keep_them_small(name):
    config = CONFIG_MAPPING[name]()
    shrunk = shrunk_config(config)
    own = {place: layer for place, layer in shrunk.to_dict()["per_layer_config"].items() if layer}
    assert {shrunk.layer_types[int(place)] for place in own} == {
        config.layer_types[int(place)] for place in config.to_dict()["per_layer_config"]
    }
    assert all(value <= 32 for layer in own.values() for value in layer.values())


def test_a_state_in_the_text_part_of_a_multimodal_model_is_found():
    model = build_model(tiny_config("llava"), weights="random")
    assert examine_model(model, [PassesDocuments])[PassesDocuments].ok
    model.model.language_model.layers[0].mixer = nn.Conv1d(4, 4, 3)
    found = examine_model(model, [PassesDocuments])[PassesDocuments]
    assert "carries state from one document of a packed row into the next" in found.reason


def test_a_large_model_that_was_changed_is_examined_itself():
    model = full_size("llama")
    model.model.layers[1].mlp = nn.Identity()
    traits = examine_model(model, [FusesHead, SplitsRows])
    assert traits[FusesHead].ok
    assert traits.deferred == (SplitsRows,)


class Mixing(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden + 0.1 * hidden.roll(1, dims=1))


def test_the_model_itself_is_left_as_it_was():
    model = build_model(tiny_config("llama"), weights="random").to_empty(device="cpu").train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.model.layers[0].mlp = Mixing(model.model.layers[0].mlp)
    forward = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda hidden: forward(hidden)  # bound to this model: a copy would run it
    traits = examine_model(model, [PassesDocuments, SplitsRows])
    assert traits.deferred == (PassesDocuments, SplitsRows)
    state = torch.get_rng_state()
    traits.complete(model, model, torch.device("cpu"))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not traits.deferred
    assert "see each other" in traits[PassesDocuments].reason
    with pytest.raises(MissingTraitError, match="Ulysses requires a model that can be computed on shards") as caught:
        traits.require(SplitsRows, by="Ulysses")
    assert "outside attention" in caught.value.reason
