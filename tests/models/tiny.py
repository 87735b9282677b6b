"""Configurations of tiny models: one per architecture, 20k to 200k parameters."""

from __future__ import annotations

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
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "layer_types": _ALTERNATE},
    "deepseek_v3": {
        **_MLA, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "glm4_moe": {**_MLA, "partial_rotary_factor": 0.5},
    "granite": {},
    "smollm3": {"no_rope_layers": [1, 0]},
}  # fmt: skip


def tiny_config(name: str, **changes: Any) -> Any:
    """Return a fresh configuration of a model type; ``changes`` replace its values."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[name](**{**_TEXT, **TEXT_MODELS[name], **changes})
    config.use_cache = False
    return config
