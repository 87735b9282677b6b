"""A tiny configuration of any causal language model that transformers knows, from the defaults of its class."""

from __future__ import annotations

from typing import Any

VOCAB = 128
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "intermediate_size_mlp"), 48
    ),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "dense_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k"), 2),
    **dict.fromkeys(("top_k_experts", "experts_per_token"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 128),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("kv_channels", "d_kv", "d_head", "attention_head_dim", "rotary_dim", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads", "linear_num_value_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    "hidden_size_per_layer_input": 8,
    "sliding_window": 8,
    "attention_chunk_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "dots1": {"layer_types": ["full_attention"] * 2, "moe_intermediate_size": 16},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
}


def causal_types() -> list[str]:
    """Every model type that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def any_tiny_config(model_type: str) -> Any:
    """Return a fresh tiny configuration; deterministic, without dropout."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    defaults = config_class()
    parts = {key: getattr(defaults, key, None) for key in defaults.sub_configs}
    values = {key: _shrunk(part) for key, part in parts.items() if part is not None}
    config = config_class(**{**_shrunk(defaults), **values, **_EXCEPTIONS.get(model_type, {})})
    config.use_cache = config.get_text_config().use_cache = False
    return config


def _shrunk(defaults: Any) -> dict[str, Any]:
    known = defaults.to_dict()
    names = {name: getattr(defaults, "attribute_map", {}).get(name, name) for name in _SIZES}
    values = {name: size for name, size in _SIZES.items() if known.get(names[name], known.get(name)) is not None}
    if "head_dim" in known:
        values["head_dim"] = _SIZES["head_dim"]
    values |= {name: 0.0 for name, value in known.items() if _is_dropout(name) and isinstance(value, float)}
    if known.get("num_key_value_heads") is not None:
        heads = known.get("num_attention_heads") or known.get("num_heads")
        values["num_key_value_heads"] = 4 if known["num_key_value_heads"] == heads else 2
    for name in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types"):
        if known.get(name):
            values[name] = _each_kind(known[name])
            values["num_hidden_layers"] = len(values[name])
    if isinstance(known.get("rope_parameters"), dict) and "mrope_section" in known["rope_parameters"]:
        values["rope_parameters"] = {**known["rope_parameters"], "mrope_section": [2, 1, 1]}
    return values


def _is_dropout(name: str) -> bool:
    return "drop" in name or name.endswith("jitter_noise")


def _each_kind(kinds: list[str]) -> list[str]:
    found = list(dict.fromkeys(kinds))
    return found if len(found) > 1 else found * 2
