"""The shape of every attention layer of a transformers model, read from its configuration and proved by its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_PROJECTIONS = {
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "g_proj",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
}  # fmt: skip


class UncountableError(Exception):
    """The FLOPs of a model cannot be derived; the message says what was not understood."""


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention; a query sees ``window`` keys at most, itself included, or with None all before it."""

    name: str
    heads: int
    qk_dim: int
    v_dim: int
    window: int | None

    @property
    def flops_per_pair(self) -> int:
        """Forward FLOPs of one (query, key) pair over all heads: its score, and its share of the weighted sum."""
        return 2 * self.heads * (self.qk_dim + self.v_dim)


def attention_shapes(named: Mapping[str, nn.Module], config: Any) -> list[AttentionShape]:
    """Return the shape of each layer's attention, in order, from the modules and the configuration of a language model.

    UncountableError where a layer does something other than causal softmax attention over all earlier tokens or a
    window of them, or the weights contradict the configuration.
    """
    modules = {
        name: module for name, module in named.items()
        if "Attention" in type(module).__name__ and next(module.parameters(), None) is not None
    }  # fmt: skip
    layers = getattr(config, "num_hidden_layers", None)
    if len(modules) != layers:
        raise UncountableError(f"it has {len(modules)} attention modules for num_hidden_layers {layers}")
    dimensions = _dimensions(config)
    windows = zip(modules, _windows(config, len(modules)), strict=True)
    shapes = [AttentionShape(name, *dimensions, window) for name, window in windows]
    for shape in shapes:
        _prove(modules[shape.name], shape)
    return shapes


def _dimensions(config: Any) -> tuple[int, int, int]:
    if getattr(config, "is_heterogeneous", False):  # reading an attribute that layers differ in is an error
        raise UncountableError("the dimensions of its layers differ")
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise UncountableError(f"num_attention_heads is {heads}")
    if getattr(config, "kv_lora_rank", None):  # multi-head latent attention
        return heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, head_dim, head_dim


def _windows(config: Any, layers: int) -> list[int | None]:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window] * layers
    if unknown := sorted(set(types) - _LAYER_TYPES):
        raise UncountableError(f"it has layers of type {', '.join(unknown)}")
    return [window if kind == "sliding_attention" else None for kind in types]


def _prove(module: nn.Module, shape: AttentionShape) -> None:
    for name, _ in module.named_parameters(recurse=False):
        if name != "sinks":
            raise UncountableError(f"{shape.name} has a parameter {name!r}")
    for name, child in module.named_children():
        matrix = any(parameter.ndim > 1 for parameter in child.parameters())
        if matrix and not (isinstance(child, nn.Linear) and name in _PROJECTIONS):
            raise UncountableError(f"{shape.name} has a part {name!r}")
    if not getattr(module, "is_causal", True):
        raise UncountableError(f"{shape.name} is not causal")
    window = getattr(module, "sliding_window", shape.window)
    if window != shape.window:
        raise UncountableError(f"{shape.name} has a window of {window}, its configuration {shape.window}")
    output, width = getattr(module, "o_proj", None), shape.heads * shape.qk_dim
    if not isinstance(output, nn.Linear) or output.in_features != shape.heads * shape.v_dim:
        raise UncountableError(f"{shape.name} has no o_proj of {shape.heads} heads x {shape.v_dim}")
    for name in ("q_proj", "q_b_proj"):
        query = getattr(module, name, None)
        if isinstance(query, nn.Linear) and query.out_features not in (width, 2 * width):  # twice: a gate beside it
            raise UncountableError(f"{shape.name}.{name} does not give {shape.heads} heads x {shape.qk_dim}")
