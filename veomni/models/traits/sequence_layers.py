"""Layers that see the sequence outside attention, found by what they are made of."""

from __future__ import annotations

from torch import nn

_STATE_PARAMETERS = frozenset({"A_log", "dt_bias"})


def layer_outside_attention(model: nn.Module) -> str | None:
    """Return the name of a layer that carries something along the sequence: state space, convolution.

    Such a layer mixes the documents of a packed row, and its state does not reach a part of a row on another rank.

    Args:
        model: A transformers model; of one with towers, only the text part is looked at.
    """
    text = {id(module) for module in text_part(model).modules()}
    for name, module in model.named_modules():
        if id(module) in text and _mixes(module):
            return f"{name} ({type(module).__name__})"
    return None


def _mixes(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d):
        return module.kernel_size != (1,)
    return any(name in _STATE_PARAMETERS for name, _ in module.named_parameters(recurse=False))


def text_part(model: nn.Module) -> nn.Module:
    """Return the text decoder of a transformers model, without towers and head; other modules are returned whole."""
    decoder = getattr(model, "get_decoder", None)
    found = decoder() if callable(decoder) else None
    return found if isinstance(found, nn.Module) else model
