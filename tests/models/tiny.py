"""Configurations of tiny models: one per architecture, 20k to 200k parameters."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

_TEXT: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4}
_MLA = {
    "moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_ALTERNATE = ["sliding_attention", "full_attention"]

TEXT_MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "layer_types": _ALTERNATE, "query_pre_attn_scalar": 8, "num_hidden_layers": 2},
    "gemma3_text": {"sliding_window": 4, "layer_types": _ALTERNATE, "query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
    "qwen3_moe": _MOE,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "layer_types": _ALTERNATE},
    "deepseek_v3": {
        **_MLA, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "glm4_moe": {**_MLA, "partial_rotary_factor": 0.5},
    "granite": {},
    "smollm3": {"no_rope_layers": [1, 0]},
}  # fmt: skip


_TOWER: dict[str, Any] = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 32, "in_channels": 3,
}  # fmt: skip
_MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
OTHER_MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "t5": {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "whisper": {
        "vocab_size": 128, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
        "max_source_positions": 32, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 1,
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "rope_parameters": _MROPE, "layer_types": ["full_attention"] * 2},
        "vision_config": {**_TOWER, "fullatt_block_indexes": [1], "window_size": 16},
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        "vision_config": {**_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "qwen3_vl_moe": {
        "text_config": {
            **_TEXT, **_MOE, "num_local_experts": 4, "rope_parameters": {**_MROPE, "mrope_interleaved": True},
        },
        "vision_config": {**_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "nomic_bert": {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    },
    "qwen3_next": {
        **_TEXT, **_MOE, "num_hidden_layers": 4, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 16, "patch_size": 4, "projection_dim": 32,
        },
    },
}  # fmt: skip
"""Not plain decoder-only text models, or with modules of their own: vision and audio towers, recurrent layers."""


def tiny_config(name: str, **changes: Any) -> Any:
    """Return a fresh configuration of a model type; ``changes`` replace its values."""
    from transformers import CONFIG_MAPPING

    values = {**_TEXT, **TEXT_MODELS[name]} if name in TEXT_MODELS else OTHER_MODELS[name]
    config = CONFIG_MAPPING[name](**deepcopy({**values, **changes}))
    config.use_cache = False
    return config
