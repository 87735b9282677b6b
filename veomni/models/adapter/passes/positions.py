"""Positions between whole numbers, which Qwen3-Omni gives to frames at a fraction of its seconds."""

from typing import Any

from torch import nn

from veomni.batch.forward_call import ForwardCall, current_call
from veomni.families.mrope import FRACTION_PARTS
from veomni.models.adapter.adapter import InputPass, ModelAdapter, Stage
from veomni.models.transformers_api.encoders import rope_rule


class AddFractions(InputPass):
    """Adds ``position_fractions`` of a micro-batch to position ids where the rotary embedding is computed.

    Position ids stay integers all the way, which mixed precision leaves alone. Without fractions nothing changes.
    """

    stage = Stage.POSITIONS

    def before(self, call: ForwardCall) -> None:
        """Take the fractions, ``[batch, seq, 3]`` in parts of one."""
        call.position_fractions = None if call.micro is None else call.micro.rows.position_fractions


def _add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    call = current_call()
    if call is None or call.position_fractions is None:
        return None
    hidden, positions, *rest = args
    # Both are exact in float32, and so is their sum: it is where they come from.
    return hidden, positions.float() + call.position_fractions.movedim(-1, 0).float() / FRACTION_PARTS, *rest


def add_fractions(adapter: ModelAdapter) -> None:
    """Make a transformers model with positions of time, height and width take fractions; others are left alone."""
    model: Any = adapter.model
    if rope_rule(type(model), model.config) is None:
        return
    adapter.add(AddFractions())
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "rotary_emb":
            adapter.hook(module, _add, before=True)
