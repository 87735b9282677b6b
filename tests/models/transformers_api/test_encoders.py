"""Padded items, positions of media, and the loss that a model computes in its forward."""

from __future__ import annotations

import inspect

import torch
import transformers

from tests.models.multimodal import family_config
from tests.models.tiny import tiny_config
from veomni.families.record import family_record
from veomni.models.transformers_api.construction import LOSS_FUNCTION
from veomni.models.transformers_api.encoders import encode_padded_audio, rope_rule
from veomni.models.transformers_api.masks import is_plain_causal


def test_padding_of_a_clip_is_not_seen():
    config = family_config("qwen2_audio").audio_config
    encoder = transformers.Qwen2AudioEncoder(config).eval()
    mel = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)
    louder = mel.clone()
    louder[..., 16:] += 1.0
    mask = (torch.arange(mel.shape[-1]) < 8).long()[None]
    with torch.no_grad():
        (output, features), (again, _) = (encode_padded_audio(encoder, values, mask) for values in (mel, louder))
    count = int(features)
    assert torch.allclose(output.last_hidden_state[:, :count], again.last_hidden_state[:, :count], atol=1e-6)
    assert not torch.allclose(output.last_hidden_state, again.last_hidden_state, atol=1e-2)


def test_a_rule_of_positions_has_no_weights():
    config = tiny_config("qwen3_vl")
    rule = rope_rule(transformers.Qwen3VLForConditionalGeneration, config)
    assert not list(rule.parameters())
    assert rope_rule(transformers.LlamaForCausalLM, tiny_config("llama")) is None


def test_a_model_that_computes_its_loss_in_its_forward() -> None:
    model = transformers.Qwen2AudioForConditionalGeneration
    assert family_record("qwen2_audio").loss_in_forward
    assert "loss_function" not in inspect.getsource(model.forward)  # once it is, the entry of the record may go


def test_an_instance_keeps_the_loss_function_it_is_given() -> None:
    model = transformers.LlamaForCausalLM(tiny_config("llama"))
    model.loss_function = print
    assert vars(model)[LOSS_FUNCTION] is print
    delattr(model, LOSS_FUNCTION)
    assert model.loss_function is not print


def test_the_plain_causal_rule_is_known() -> None:
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    assert is_plain_causal(causal_mask_function)
    assert not is_plain_causal(sliding_window_causal_mask_function(4))
