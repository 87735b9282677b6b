"""Tensors of checkpoints become parameters, and parameters tensors of checkpoints."""

from __future__ import annotations

import pytest
import transformers
from transformers import WeightConverter, core_model_loading

from tests.models.tiny import tiny_config
from veomni.models.transformers_api.conversions import Conversion, loading_conversions, saving_conversions


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "glm4_moe"])
def test_experts_stack_row_by_row(name):
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(name))
    names = []
    for group in saving_conversions(model, list(model.state_dict())):
        tensors = {key: [model.state_dict()[n] for n in parts] for key, parts in group.sources.items()}
        names += group.convert(model, tensors)
    groups = [group for group in loading_conversions(model, names) if group.converter is not None]
    assert {group.key.rsplit(".", 1)[1] for group in groups} == {"gate_up_proj", "down_proj"}
    assert all(group.stacks_rows and {len(n) for n in group.sources.values()} == {4} for group in groups)


def test_a_conversion_that_mixes_rows_is_not_taken_for_one_that_stacks():
    mixing = WeightConverter(
        "a.*.w", "b.w", operations=[core_model_loading.MergeModulelist(0), core_model_loading.Transpose(0, 1)]
    )
    assert not Conversion("b.w", {}, mixing).stacks_rows
    assert not Conversion("b.w", {"b.w": ["b.w"]}).stacks_rows


def test_checkpoint_keys_that_change_name_are_grouped():
    model = transformers.LlamaForCausalLM(tiny_config("llama"))
    groups = loading_conversions(model, ["layers.0.mlp.up_proj.weight", "lm_head.weight", "strange"])
    assert [group.key for group in groups] == ["model.layers.0.mlp.up_proj.weight", "lm_head.weight", "strange"]
