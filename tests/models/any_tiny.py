"""A tiny configuration of any causal language model that transformers knows, from the defaults of its class."""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from veomni.models.traits.shrink import merged, shrunk_values

_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
_SLIDING_FULL_FULL = [*_SLIDING_AND_FULL, "full_attention"]
_CONV_FULL_FULL = ["conv", "full_attention", "full_attention"]
_QWEN4: dict[str, Any] = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 4, "hc_lowrank": 8,
}  # fmt: skip
_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_NEEDED = {"gemma4_assistant": {"text_config": _ASSISTANT}}
"""What a class does without defaults for, by model type."""
_OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {49: 4}, "image_token_index": 1000},
    "blt": {
        "hidden_size": 32,
        "global_config": {"hidden_size": 64, "num_attention_heads": 8},
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
        "encoder_hash_byte_group_vocab": 64,
    },
    "cohere_compass_text": {
        "layer_types": _SLIDING_AND_FULL,
        "rope_parameters": {name: {"rope_type": "default", "rope_theta": 1e4} for name in _SLIDING_AND_FULL},
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 32}},
    "deepseek_ocr2": {
        "text_config": {
            "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"], "num_experts_per_tok": 2,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {
        "num_hidden_layers": 3, "layer_types": _SLIDING_FULL_FULL, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [16, 16],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
    },
    "emu3": {"vocabulary_map": {"<image>": 100, "<|extra_200|>": 101, "<|visual token 000000|>": 102}},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_groups": 1},
    "flint": {"mlp_only_layers": [0]},
    "gemma3": {"mm_tokens_per_image": 4, "vision_config": {"image_size": 16, "patch_size": 4}},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": _SLIDING_AND_FULL * 2, "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_assistant": {"text_config": _ASSISTANT},
    "git": {"vision_config": {"image_size": 8, "patch_size": 4}},
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1],
            },
        },
    },
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0}},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "lfm2": {"num_hidden_layers": 3, "layer_types": _CONV_FULL_FULL},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": _CONV_FULL_FULL, "num_dense_layers": 1},
    "llama4": {
        "vision_config": {
            "image_size": 16, "patch_size": 4, "intermediate_size": 128, "projector_input_dim": 32,
            "projector_output_dim": 32, "vision_output_dim": 32,
        },
    },
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mistral4": {"head_dim": 16},
    "muse_spark": {
        "vision_config": {"out_hidden_size": 32},
        "audio_config": {
            "num_hidden_layers": 2, "patch_sizes": [4, 2], "hidden_sizes": [16, 32], "depths": [1, 1],
            "out_hidden_size": 32,
        },
    },
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 1, "layers_block_type": ["mamba", "moe", "full_attention", "moe"]},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"],
        "attention_head_size": 8, "num_buckets": 4, "feed_forward_size": 48,
    },
    "step3p7": {
        "text_config": {
            "num_hidden_layers": 3, "layer_types": _SLIDING_FULL_FULL, "sliding_window": 8, "share_expert_dim": 16,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    },
    "whisper": {"max_source_positions": 32, "num_mel_bins": 8},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What cannot be read off the defaults of a class, by model type."""
_GEMMA4 = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
_WITH_EXPERTS: dict[str, dict[str, Any]] = {"gemma4": {"text_config": _GEMMA4}, "gemma4_text": _GEMMA4}
"""What turns on the experts of model types that are dense by default."""
_OTHER_EXPERTS = ("dbrx", "doge", "jetmoe", "llama4", "llama4_text", "longcat_flash", "step3p7")
"""Mixtures of experts that do not go through transformers' experts interface."""


def causal_types() -> list[str]:
    """Every model type that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def expert_types() -> list[str]:
    """Every model type with experts that transformers trains on tokens, through its experts interface or not."""
    import transformers
    from transformers.models.auto import modeling_auto

    names: dict[str, Any] = {
        **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    classes = {kind: getattr(transformers, name) for kind, name in names.items()}
    through = [kind for kind, found in classes.items() if found._can_set_experts_implementation()]
    learns = [kind for kind in through if "labels" in inspect.signature(classes[kind].forward).parameters]
    return sorted([*learns, *_OTHER_EXPERTS])


def plain_inputs(model_type: str, tokens: Tensor) -> dict[str, Tensor]:
    """Return what a model trains on where transformers runs it: ``tokens``, ``[batch, seq]``, are their own labels."""
    if model_type == "whisper":
        return {"input_features": torch.zeros(len(tokens), 8, 64), "labels": tokens}
    return {"input_ids": tokens, "labels": tokens}


def one_of_each_entry(known: dict[str, Any], layers: int) -> dict[str, list[Any]]:
    """Return each list of kinds of layers cut to one of every kind, as if it were the only one."""
    lists = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types")
    found = {name: list(dict.fromkeys(known[name])) for name in lists if known.get(name)}
    return {name: kinds + kinds[-1:] * (layers - len(kinds)) for name, kinds in found.items()}


def any_tiny_config(model_type: str, *, experts: bool = False) -> Any:
    """Return a fresh tiny configuration; deterministic, without dropout.

    Args:
        model_type: What transformers calls it.
        experts: Several layers with experts, behind a dense one where the family has such.
    """
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    defaults = config_class(**deepcopy(_NEEDED.get(model_type, {})))
    values = merged(shrunk_values(defaults, 3 if experts else 2, one_of_each_entry), _OVERRIDES.get(model_type, {}))
    config = config_class(**merged(values, _WITH_EXPERTS.get(model_type, {}) if experts else {}))
    config.use_cache = config.get_text_config(decoder=True).use_cache = False
    return config
