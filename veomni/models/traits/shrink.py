"""A configuration of the same kind with small numbers: two layers or one of each kind, narrow, with few experts."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from veomni.models.transformers_api.construction import construct_again

VOCAB = 128
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_OWN = "per_layer_config"
"""What some layers have instead of the values of the configuration, by their place."""
_NAMES: dict[float, str] = {
    VOCAB: "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions n_ctx max_seq_len "
    "max_sequence_length",
    48: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size intermediate_size_mlp decoder_ffn_dim encoder_ffn_dim "
    "dense_intermediate_size",
    32: "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim out_hidden_size "
    "adapter_in_dim adapter_out_dim adapter_input_size",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
    "moe_ffn_hidden_size moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank linear_key_head_dim "
    "linear_value_head_dim mamba_head_dim mamba_d_head attention_chunk_size",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim global_head_dim kv_channels d_kv d_head "
    "attention_head_dim rotary_dim query_pre_attn_scalar hidden_size_per_layer_input sliding_window state_size "
    "mamba_d_state ssm_state_size chunk_size mamba_chunk_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "mamba_num_heads mamba_n_heads linear_num_value_heads linear_num_key_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts",
    2: "num_experts_per_tok moe_topk moe_k num_experts_per_token moe_top_k top_k_experts experts_per_token "
    "eos_token_id",
    1: "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace bos_token_id",
    0: "pad_token_id decoder_start_token_id",
    0.1: "initializer_range",
}
_SIZES: dict[str, Any] = {name: size for size, names in _NAMES.items() for name in names.split()}
"""Small values by the names that configurations have for them."""


def shrunk_copy(model: nn.Module, limit: int) -> nn.Module:
    """Return a small model of the class of a transformers model on the meta device.

    A ValueError where the configuration does not describe it, or no copy has at most ``limit`` parameters.
    """
    with torch.device("meta"):
        if _kinds(construct_again(model)) != _kinds(model):
            raise ValueError("the model is not what its configuration describes")
        try:
            copy = construct_again(model, shrunk_config(model.config))
        except Exception as error:  # small numbers that a class does not take together
            raise ValueError("its configuration cannot be shrunk") from error
    if sum(parameter.numel() for parameter in copy.parameters()) > limit:
        raise ValueError("its configuration cannot be shrunk far enough")
    return copy


def _kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def shrunk_config(config: Any) -> Any:
    """Return a small configuration of the class of a transformers configuration of any size."""
    known = {name: value for name, value in config.to_dict().items() if name not in ("transformers_version", "dtype")}
    shrunk = type(config)(**merged(known, shrunk_values(config, layers=2)))
    shrunk.architectures = config.architectures
    return shrunk


ByLayer = Callable[[dict[str, Any], int], dict[str, list[Any]]]
"""From the values of a configuration and a number of layers at least to what there is an entry of for each layer."""


def of_each_kind(known: dict[str, Any], layers: int) -> dict[str, list[Any]]:
    """Keep one layer of every combination of what a configuration says of its layers."""
    count = next((known[name] for name in ("num_hidden_layers", *_LAYERS) if known.get(name)), None)
    lists = {name: value for name, value in known.items() if isinstance(value, list) and len(value) == count}
    if known.get(_OWN):
        own = {int(place): changed for place, changed in known[_OWN].items()}
        lists[_OWN] = [own.get(place) for place in range(count or 0)]
    entries = [str(entry) for entry in zip(*lists.values(), strict=True)]
    chosen = [entries.index(entry) for entry in dict.fromkeys(entries)]
    chosen += chosen[-1:] * (layers - len(chosen))
    return {name: [value[place] for place in chosen] for name, value in lists.items()}


def shrunk_values(config: Any, layers: int, by_layer: ByLayer = of_each_kind) -> dict[str, Any]:
    """Return small values for what a configuration, and those inside it, have, with ``layers`` at least."""
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    inside = {key: shrunk_values(part, layers, by_layer) for key, part in parts.items() if part is not None}
    return {**_own_values(config, layers, by_layer), **inside}


def merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return a deep copy of ``values`` in which ``overrides`` replace single values, also in nested mappings."""
    nested = {
        key: merged(values[key], value)
        for key, value in overrides.items()
        if key != _OWN and isinstance(value, dict) and isinstance(values.get(key), dict)
    }
    return deepcopy({**values, **overrides, **nested})


def _own_values(config: Any, layers: int, by_layer: ByLayer) -> dict[str, Any]:
    known = config.to_dict()
    sizes = {**_SIZES, **dict.fromkeys(_LAYERS, layers)}
    names = {name: getattr(config, "attribute_map", {}).get(name, name) for name in sizes}
    values = {name: sizes[name] for name, real in names.items() if known.get(real, known.get(name)) is not None}
    if "head_dim" in known:
        values["head_dim"] = _SIZES["head_dim"]
    dropouts = [name for name in known if "drop" in name or name.endswith("jitter_noise")]
    values |= {name: 0.0 for name in dropouts if isinstance(known[name], float)}
    if known.get("num_key_value_heads") is not None:
        heads = known.get("num_attention_heads") or known.get("num_heads")
        values["num_key_value_heads"] = 4 if known["num_key_value_heads"] == heads else 2
    if isinstance(known.get("rope_parameters"), dict) and "mrope_section" in known["rope_parameters"]:
        values["rope_parameters"] = {**known["rope_parameters"], "mrope_section": [2, 1, 1]}
    lists = by_layer(known, layers)
    if lists:
        values["num_hidden_layers"] = len(list(lists.values())[-1])
    own = {place: _doubled(changed) for place, changed in enumerate(lists.pop(_OWN, ())) if changed}
    return {**values, **lists, **({_OWN: own} if own else {})}


def _doubled(changed: dict[str, Any]) -> dict[str, Any]:
    """Return what a layer has of its own, twice as large as in other layers."""
    sizes = {name: 2 * _SIZES[name] if name in _SIZES else value for name, value in changed.items()}
    if "num_key_value_heads" in changed:
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads", 4)
    if "qk_nope_head_dim" in changed:  # such layers have heads of both parts
        sizes["head_dim"] = sizes["qk_nope_head_dim"] + sizes.get("qk_rope_head_dim", _SIZES["qk_rope_head_dim"])
    return sizes
