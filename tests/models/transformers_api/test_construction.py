"""Models are constructed and initialised as transformers does it."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

from tests.models.tiny import tiny_config
from veomni.models.transformers_api.attention import attention_of
from veomni.models.transformers_api.construction import construct, initialisers, tied_parameters


def test_construct_sets_dtype_and_attention():
    model = construct(transformers.LlamaForCausalLM, tiny_config("llama", dtype="bfloat16"), "eager")
    assert model.dtype is torch.float32
    assert attention_of(model) == "eager"
    assert tied_parameters(model) == {}


def test_initialisers_follow_transformers_order_and_owner(monkeypatch):
    model = transformers.LlavaForConditionalGeneration(tiny_config("llava"))
    seen: list[tuple[int, int]] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            monkeypatch.setattr(
                module, "_initialize_weights", lambda m, *args, owner=module: seen.append((id(m), id(owner)))
            )
    model.initialize_weights()
    runs = [run for _, run in initialisers(model)]
    assert [(id(run.args[0]), id(run.func.__self__)) for run in runs] == seen
    assert len(seen) > 40


def test_tied_parameters():
    model = transformers.Qwen3ForCausalLM(tiny_config("qwen3"))
    assert tied_parameters(model) == {"lm_head.weight": "model.embed_tokens.weight"}
