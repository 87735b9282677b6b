"""Positions between whole numbers, which Qwen3-Omni gives to what is seen at a fraction of its seconds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from veomni.batch.micro_batch import MicroBatch
from veomni.families.mrope import FRACTION_PARTS
from veomni.models.transformers_api.encoders import rope_rule


def add_fractions(model: nn.Module) -> None:
    """Add a micro-batch's ``position_fractions`` to the position ids of a model with time, height and width.

    They are added where the rotary embedding is computed: position ids stay integers all the way, which mixed
    precision leaves alone. Without fractions nothing changes.

    Args:
        model: A transformers model, before it is sharded.
    """
    if rope_rule(type(model), model.config) is None:  # type: ignore[arg-type]
        return
    given: list[Tensor | None] = [None]

    def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        micro = MicroBatch.of_call(kwargs)
        given[0] = None if micro is None else micro.rows.position_fractions

    def add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if given[0] is None:
            return None
        hidden, positions, *rest = args
        # Both are exact in float32, and so is their sum: it is where they come from.
        return hidden, positions.float() + given[0].movedim(-1, 0).float() / FRACTION_PARTS, *rest

    model.register_forward_pre_hook(take, with_kwargs=True)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "rotary_emb":
            module.register_forward_pre_hook(add)
