"""Keep packed documents apart in every mask a transformers model builds.

transformers finds packed documents by itself only where a model hands its position ids to the mask maker; GPT-OSS and
others do not, and would mix documents without a word. Here the borders of the row in hand are known to the mask makers
whatever the model passes on, and are added to its own rule (causal, sliding, chunked).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from veomni.batch.micro_batch import MicroBatch
from veomni.errors import ModelError
from veomni.models.traits.sequence_layers import layer_outside_attention
from veomni.models.transformers_api.capabilities import is_pretrained
from veomni.models.transformers_api.masks import counted_from, leave_packing_to, mask_makers, within_documents
from veomni.ops.attention.ring import MASK_RULE, register_mask_rule

_ISOLATES = "_veomni_isolates_documents"
_LEAK = "_veomni_leak"
_MAKERS = ("sdpa", "eager", "flex_attention")

_row: ContextVar[Row | None] = ContextVar("veomni_row", default=None)


@dataclass(frozen=True)
class Row:
    """The rows in hand, whole even where this rank computes on a part of them.

    Attributes:
        documents: The number of each token's document, int64 ``[batch, seq]``; None where each row is one.
        towers: Configuration classes whose masks are not of these rows.
    """

    documents: Tensor | None
    towers: frozenset[type] = frozenset()

    @property
    def positions(self) -> Tensor:
        """Each token's place in its document, int64 ``[batch, seq]``."""
        assert self.documents is not None
        place = torch.arange(self.documents.shape[1], device=self.documents.device).expand_as(self.documents)
        starts = torch.diff(self.documents, prepend=self.documents[:, :1] - 1, dim=-1) != 0
        return place - torch.where(starts, place, 0).cummax(-1).values


def isolate_documents(model: nn.Module) -> None:
    """Make ``model`` keep the documents of packed rows apart, and refuse packed rows where it cannot.

    Calling it again changes nothing.

    Args:
        model: A transformers model, whose call must name its arguments; other modules are left alone.
    """
    if not is_pretrained(model) or getattr(model, _ISOLATES, False):
        return
    setattr(model, _ISOLATES, True)
    _wrap_mask_makers()
    leave_packing_to(lambda: _row.get() is not None)
    layer = layer_outside_attention(model)
    towers = _tower_configs(model)
    carries = f"{layer} carries state from one document of a packed row into the next" if layer else None

    def announce(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        row = row_of(kwargs)
        reason = carries or getattr(model, _LEAK, None)
        if reason is not None and row is not None and row.documents is not None:
            raise ModelError(reason, "set data.packing to none, so that every row is one document")
        _row.set(row if row is None else replace(row, towers=towers))
        return args, kwargs

    def retire(module: nn.Module, args: Any, output: Any) -> None:
        _row.set(None)

    model.register_forward_pre_hook(announce, with_kwargs=True)
    model.register_forward_hook(retire, always_call=True)


def _tower_configs(model: Any) -> frozenset[type]:
    parts = (getattr(model.config, name, None) for name in model.config.sub_configs)
    return frozenset(type(part) for part in parts if part is not None) - {type(model.config.get_text_config())}


def remember_leak(model: nn.Module, reason: str | None) -> None:
    """Let ``model`` refuse packed rows for ``reason``; None lets it take them."""
    setattr(model, _LEAK, reason)


def row_of(inputs: Mapping[str, Any]) -> Row | None:
    """Find the documents of the rows in hand.

    Args:
        inputs: A model's arguments; ``position_ids`` is ``[batch, seq]``, or ``[axes, batch, seq]`` with text first.

    Returns:
        The rows, or None where they are padded, continue a cache, or are whole and one document each.
    """
    positions = inputs.get("position_ids")
    if positions is None or inputs.get("attention_mask") is not None or inputs.get("past_key_values") is not None:
        return None
    rows = positions[0] if positions.dim() == 3 else positions
    borders = inputs.get("cu_seq_lens_q")
    micro = MicroBatch.of_call(inputs)
    if micro is not None and micro.rows.shard.size > 1:
        if borders is None:
            return Row(None)
        return Row(_documents_between(borders, rows.shape[0], rows.shape[1] * micro.rows.shard.size))
    documents = (torch.diff(rows, prepend=rows[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    if borders is None and not bool(documents[:, -1].any()):
        return None
    return Row(documents)


def _documents_between(borders: Tensor, batch: int, length: int) -> Tensor:
    tokens = torch.arange(batch * length, device=borders.device, dtype=borders.dtype)
    return torch.searchsorted(borders[1:], tokens, right=True).view(batch, length)


def _wrap_mask_makers() -> None:
    from transformers import AttentionMaskInterface

    register_mask_rule()
    for name, make in mask_makers((*_MAKERS, MASK_RULE)).items():
        if not hasattr(make, "_veomni_packed"):
            AttentionMaskInterface.register(name, _packed(make))


def _packed(make: Callable[..., Any]) -> Callable[..., Any]:
    def make_packed(*args: Any, **options: Any) -> Any:
        row = _row.get()
        documents = None if row is None else row.documents
        shape = options.get("batch_size"), options.get("q_length"), options.get("kv_length")
        if row is None or documents is None or shape != (*documents.shape, documents.shape[1]):
            return make(*args, **options)
        if type(options.get("config")) in row.towers:
            return make(*args, **options)
        rule = options["mask_function"]
        if getattr(options.get("config"), "attention_chunk_size", None) is not None:
            rule = counted_from(rule, row.positions)  # chunks are counted from the start of a document
        options["mask_function"] = within_documents(rule, documents)
        options["allow_is_causal_skip"] = False
        return make(*args, **options)

    make_packed._veomni_packed = True  # type: ignore[attr-defined]
    return make_packed
