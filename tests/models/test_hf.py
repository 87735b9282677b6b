"""The contract with transformers: each name that is not exported and that veomni relies on, and what it does.

When one fails after an upgrade of transformers, `veomni/models/transformers_api/hf.py` is the only file to change.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel, WeightConverter, conversion_mapping, core_model_loading, modeling_utils

import veomni
from tests.models.tiny import tiny_config
from veomni.models.transformers_api import hf

PACKAGE = Path(veomni.__file__).parent


def test_hf_is_the_only_file_that_imports_what_is_not_exported():
    offenders = []
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "examples").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            inner = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers.")
            absent = (
                isinstance(node, ast.ImportFrom)
                and node.module == "transformers"
                and not all(hasattr(transformers, alias.name) for alias in node.names)
            )
            if (inner or absent) and path.parent != PACKAGE / "models" / "transformers_api":
                offenders.append(f"{path}:{node.lineno}")
    assert offenders == []


def test_modeling_utils():
    assert {"sdpa", "flash_attention_2"} <= set(modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys())
    assert {"eager", "sdpa"} <= set(hf.attention_names())
    for name in ("_from_config", "_init_weights", "set_experts_implementation", "_can_set_experts_implementation"):
        assert callable(getattr(PreTrainedModel, name)), name
    for name in ("_no_split_modules", "_keep_in_fp32_modules_strict", "_supports_sdpa", "_supports_flash_attn"):
        assert hasattr(PreTrainedModel, name), name
    for name in ("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing", "base_model_prefix"):
        assert hasattr(PreTrainedModel, name), name


def test_construct_sets_dtype_and_attention():
    model = hf.construct(transformers.LlamaForCausalLM, tiny_config("llama", dtype="bfloat16"), "eager")
    assert model.dtype is torch.float32
    assert model.config._attn_implementation == "eager"
    assert hf.tied_parameters(model) == {}


def test_initialisers_follow_transformers_order_and_owner(monkeypatch):
    model = transformers.LlavaForConditionalGeneration(tiny_config("llava"))
    seen: list[tuple[int, int]] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            monkeypatch.setattr(
                module, "_initialize_weights", lambda m, *args, owner=module: seen.append((id(m), id(owner)))
            )
    model.initialize_weights()
    assert [(id(module), id(owner)) for _, module, owner in hf.initialisers(model)] == seen
    assert len(seen) > 40


def test_tied_parameters():
    model = transformers.Qwen3ForCausalLM(tiny_config("qwen3"))
    assert hf.tied_parameters(model) == {"lm_head.weight": "model.embed_tokens.weight"}


def test_conversion_primitives():
    signature = inspect.signature(conversion_mapping.get_model_conversion_mapping)
    assert {"model", "add_legacy"} <= set(signature.parameters)
    names = list(inspect.signature(core_model_loading.rename_source_key).parameters)
    assert names[:5] == [
        "source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict",
    ]  # fmt: skip
    for name in ("add_tensor", "convert", "rename_source_key", "reverse_transform", "was_used"):
        assert callable(getattr(WeightConverter, name)), name
    assert core_model_loading.MergeModulelist(dim=0).dim == 0
    assert core_model_loading.Concatenate(dim=1).dim == 1
    assert (core_model_loading.Transpose(1, 2).dim0, core_model_loading.Transpose(1, 2).dim1) == (1, 2)
    assert issubclass(core_model_loading.PrefixChange, core_model_loading.WeightRenaming)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "glm4_moe"])
def test_experts_stack_row_by_row(name):
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(name))
    names = []
    for group in hf.saving_conversions(model, list(model.state_dict())):
        tensors = {key: [model.state_dict()[n] for n in parts] for key, parts in group.sources.items()}
        names += group.convert(model, tensors)
    groups = [group for group in hf.loading_conversions(model, names) if group.converter is not None]
    assert {group.key.rsplit(".", 1)[1] for group in groups} == {"gate_up_proj", "down_proj"}
    assert all(group.stacks_rows and {len(n) for n in group.sources.values()} == {4} for group in groups)


def test_a_conversion_that_mixes_rows_is_not_taken_for_one_that_stacks():
    mixing = WeightConverter(
        "a.*.w", "b.w", operations=[core_model_loading.MergeModulelist(0), core_model_loading.Transpose(0, 1)]
    )
    assert not hf.Conversion("b.w", {}, mixing).stacks_rows
    assert not hf.Conversion("b.w", {"b.w": ["b.w"]}).stacks_rows


def test_checkpoint_keys_that_change_name_are_grouped():
    model = transformers.LlamaForCausalLM(tiny_config("llama"))
    groups = hf.loading_conversions(model, ["layers.0.mlp.up_proj.weight", "lm_head.weight", "strange"])
    assert [group.key for group in groups] == ["model.layers.0.mlp.up_proj.weight", "lm_head.weight", "strange"]


def test_routers_are_recorded_and_their_own_loss_is_found_and_dropped():
    config = tiny_config("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.5)
    model = transformers.Qwen3MoeForCausalLM(config)
    found = [(name, type(module).__name__, index) for name, module, index in hf.router_logits(model)]
    assert found == [(f"model.layers.{layer}.mlp.gate", "Qwen3MoeTopKRouter", 0) for layer in range(2)]
    assert hf.own_balance_loss(model) == 0.5
    assert hf.balances_on_softmax(model)
    tokens = torch.arange(8)[None]
    with_aux = model(input_ids=tokens, labels=tokens)
    hf.drop_own_balance_loss(model)
    without = model(input_ids=tokens, labels=tokens)
    assert without.aux_loss is None
    assert torch.allclose(with_aux.loss - without.loss, 0.5 * with_aux.aux_loss)
    assert model.config.output_router_logits is True
    dense = transformers.LlamaForCausalLM(tiny_config("llama"))
    assert hf.own_balance_loss(dense) is None
    assert not hf.balances_on_softmax(dense)
    assert list(hf.router_logits(dense)) == []


def test_what_towers_rest_on():
    from transformers import masking_utils, vision_utils

    names = ("get_vision_cu_seqlens", "get_vision_position_ids", "get_vision_window_index")
    assert all(callable(getattr(vision_utils, name)) for name in names)
    assert callable(masking_utils.create_bidirectional_mask)
    model = transformers.Qwen2AudioForConditionalGeneration
    assert hf.computes_loss_itself(model.__new__(model))
    assert "loss_function" not in inspect.getsource(model.forward)  # once it is, hf.computes_loss_itself may go


def test_a_padded_place_is_not_seen():
    config = tiny_config("llava").vision_config
    config._attn_implementation = "sdpa"
    seen = torch.tensor([[True, True, False]])
    mask = hf.bidirectional_mask(config, seen, torch.float32)
    assert mask.shape == (1, 1, 3, 3)
    assert torch.equal(mask[0, 0, 0], seen[0])


def test_a_rule_of_positions_has_no_weights():
    config = tiny_config("qwen3_vl")
    rule = hf.rope_rule(transformers.Qwen3VLForConditionalGeneration, config)
    assert not list(rule.parameters())
    assert hf.rope_rule(transformers.LlamaForCausalLM, tiny_config("llama")) is None


def test_rendering_is_that_of_apply_chat_template():
    from veomni.data import CHAT_TEMPLATES, train_byte_bpe

    tokenizer = train_byte_bpe(["some text to learn from"], 300)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    template = CHAT_TEMPLATES.get("llava")  # it reads a special token
    text, blocks = hf.render_chat(tokenizer, messages, template, blocks=True)
    assert text == tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert [text[start:end] for start, end in blocks] == [" bc<|endoftext|>"]
    text, blocks = hf.render_chat(tokenizer, messages[:1], template, prompt=True)
    assert (text, blocks) == ("USER: a ASSISTANT:", [])
