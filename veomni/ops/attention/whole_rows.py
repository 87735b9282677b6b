"""Attention over whole rows, of which each rank holds a shard: its registration with transformers, and its ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.distributed import ProcessGroup

from veomni.batch.forward_call import current_groups
from veomni.errors import ModelError

UNSPLIT_ATTENTION = "_veomni_unsplit_attention"
"""The attribute for the attention of a model before its rows were split."""


def use_attention(body: Any, name: str) -> None:
    """Make the text part of a transformers model run with the attention called ``name``; towers keep theirs."""
    text = body.config.get_text_config()
    parts = [key for key in body.config.sub_configs if getattr(body.config, key, None) is text]
    body.set_attn_implementation({parts[0]: name} if parts else name)


def group_of(axis: Literal["ulysses", "ring"]) -> ProcessGroup:
    """Return the ranks that share the rows of the forward around over ``axis``.

    Raises:
        ModelError: its model was not set up with them.
    """
    group: ProcessGroup | None = getattr(current_groups(), axis)
    if group is None:
        raise ModelError(f"the model's attention is that of {axis}, without its ranks", "set the model up with them")
    return group


def register_whole_rows(
    name: str, axis: Literal["ulysses", "ring"], attention: Callable[..., Any], make_mask: Callable[..., Any]
) -> str:
    """Register an attention with transformers under ``name``, and return that.

    It is called with this rank's queries, keys and values; ``make_mask``, a mask maker of transformers, for the
    positions of all ranks on ``axis``.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    def make(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **options: Any) -> Any:
        if attention_mask is not None:
            raise ModelError(f"{name} was given a padding mask", "pack the documents and leave attention_mask out")
        size = group_of(axis).size()
        return make_mask(q_length=q_length * size, kv_length=kv_length * size, attention_mask=None, **options)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, make)
    return name
