from __future__ import annotations

import pytest

from tests.models.tiny import tiny_config
from veomni.errors import ModelError
from veomni.models import build_model, freeze


def test_parameters_and_modules_are_frozen_by_pattern():
    model = build_model(tiny_config("qwen3_vl"))
    frozen = freeze(model, ["model.visual", "*.layers.0.mlp.*.weight"])
    assert frozen == [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all(name.startswith("model.visual.") or ".layers.0.mlp." in name for name in frozen)
    assert "model.visual.blocks.0.attn.qkv.weight" in frozen
    assert model.lm_head.weight.requires_grad


def test_a_tied_parameter_is_frozen_by_either_name():
    model = build_model(tiny_config("qwen3"))
    assert freeze(model, ["lm_head"]) == ["lm_head.weight"]
    assert not model.model.embed_tokens.weight.requires_grad


def test_a_pattern_that_matches_nothing_is_rejected():
    model = build_model(tiny_config("llama"))
    with pytest.raises(ModelError, match=r"'model\.embed_token'") as error:
        freeze(model, ["lm_head", "model.embed_token"])
    assert "model.embed_tokens" in error.value.fix
    assert all(parameter.requires_grad for parameter in model.parameters())
