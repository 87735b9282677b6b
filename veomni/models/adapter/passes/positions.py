"""Positions between whole numbers, which Qwen3-Omni gives to frames at a fraction of its seconds.

Position ids stay integers, which mixed precision leaves alone, up to where the rotary embedding is computed.
"""

from typing import Any

from torch import nn

from veomni.batch.forward_call import current_call
from veomni.families.mrope import FRACTION_PARTS
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.transformers_api.encoders import rope_rule


def add_fractions(adapter: ModelAdapter) -> None:
    """Add ``position_fractions`` of micro-batches in a transformers model with positions of time, height and width."""
    model: Any = adapter.model
    for name, module in model.named_modules() if rope_rule(type(model), model.config) is not None else ():
        if name.rpartition(".")[2] == "rotary_emb":
            adapter.hook(module, _add, before=True)


def _add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    call = current_call()
    fractions = None if call is None or call.micro is None else call.micro.rows.position_fractions
    if fractions is None:
        return None
    hidden, positions, *rest = args
    # Both are exact in float32, and so is their sum: it is where they come from.
    return hidden, positions.float() + fractions.movedim(-1, 0).float() / FRACTION_PARTS, *rest
