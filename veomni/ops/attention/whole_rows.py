"""Attention over whole rows, of which each rank holds a shard: its registration with transformers, and its ranks."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from veomni.batch.forward_call import SequenceGroups, current_call
from veomni.errors import ModelError

UNSPLIT_ATTENTION = "_veomni_unsplit_attention"
"""The attribute for the attention of a model before its rows were split."""
SEQUENCE_GROUPS = "sequence_groups"
"""The attribute for the ranks that share rows, on every module that may call attention.

Not the call around a forward: a recomputation runs outside of it, on CUDA in another thread, and so does compiled code.
"""


def use_attention(body: Any, name: str) -> None:
    """Make the text part of a transformers model run with the attention called ``name``; encoders keep theirs."""
    text = body.config.get_text_config()
    parts = [key for key in body.config.sub_configs if getattr(body.config, key, None) is text]
    body.set_attn_implementation({parts[0]: name} if parts else name)


def group_of(axis: Literal["ulysses", "ring"], groups: SequenceGroups | None) -> ProcessGroup:
    """Return the ranks that share rows over ``axis``; a ModelError where the model was not set up with them."""
    group: ProcessGroup | None = getattr(groups, axis, None)
    if group is None or groups is None or not groups.key:  # reading the key guards a compiled graph
        raise ModelError(f"the model's attention is that of {axis}, without its ranks", "set the model up with them")
    return group


def share_rows(module: nn.Module, groups: SequenceGroups, patch: Callable[[nn.Module, str, Any], None]) -> None:
    """Give ``groups`` to every module in ``module`` that may call attention, by the adapter's ``patch``."""
    for each in module.modules():
        if hasattr(each, "config"):  # transformers finds the attention to call there
            patch(each, SEQUENCE_GROUPS, groups)


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
        call = current_call()
        size = group_of(axis, None if call is None else call.sequence).size()
        return make_mask(q_length=q_length * size, kv_length=kv_length * size, attention_mask=None, **options)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, make)
    return name
