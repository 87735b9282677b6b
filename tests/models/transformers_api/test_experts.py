"""Routers and the load-balancing loss of a model."""

from __future__ import annotations

import torch
import transformers

from tests.models.tiny import tiny_config
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.adapter.passes.token_loss import DropBalanceLoss
from veomni.models.transformers_api.experts import (
    balances_on_softmax,
    own_balance_loss,
    router_logits,
)


def test_routers_are_recorded_and_their_own_loss_is_found_and_dropped():
    config = tiny_config("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.5)
    model = transformers.Qwen3MoeForCausalLM(config)
    found = [(name, type(module).__name__, index) for name, module, index in router_logits(model)]
    assert found == [(f"model.layers.{layer}.mlp.gate", "Qwen3MoeTopKRouter", 0) for layer in range(2)]
    assert own_balance_loss(model) == 0.5
    assert balances_on_softmax(model)
    tokens = torch.arange(8)[None]
    with_aux = model(input_ids=tokens, labels=tokens)
    ModelAdapter.of(model).add(DropBalanceLoss())
    without = model(input_ids=tokens, labels=tokens)
    assert without.aux_loss is None
    assert torch.allclose(with_aux.loss - without.loss, 0.5 * with_aux.aux_loss)
    assert model.config.output_router_logits is True
    dense = transformers.LlamaForCausalLM(tiny_config("llama"))
    assert own_balance_loss(dense) is None
    assert not balances_on_softmax(dense)
    assert list(router_logits(dense)) == []
