"""Calls of encoders: every image, video or audio clip is an item, and ranks can share the items of a call.

Features enter a transformers model through one method per modality (``get_image_features`` ...), which a
:class:`TowerCall` replaces on the instance.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_TEXT_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

# Whether an encoder runs, of any modality: Qwen3-VL's videos go through the method of images.
_encoding: ContextVar[bool] = ContextVar("veomni_encoding", default=False)

Encode = Callable[["Items"], list[list[Tensor]]]
"""From items to streams (the features, then those of every deepstack layer), each one ``[tokens, hidden]`` an item."""
Exchange = Callable[["Items", Encode], list[Tensor]]
"""Encodes this rank's items with other ranks; returns each stream's ``[tokens, hidden]`` for this rank's tokens."""
Balance = Callable[["Items", Encode], list[list[Tensor]]]
"""Encodes this rank's items on the least loaded ranks; returns what ``Encode`` does, at least an empty piece each."""


@dataclass(frozen=True)
class TowerKind:
    """What distinguishes one modality's calls.

    Attributes:
        modality: "image", "video" or "audio".
        method: The owner's method that encodes.
        values: Its argument with pixels or mel features.
        sizes: Its argument with a row per item, grids or masks of frames; None where ``values`` has an entry per item.
        patches: ``values`` is ``[patches, channels]``, with ``sizes`` as (frames, height, width) of every item.
        token: The configuration's name of the placeholder token.
        token_type: The modality's number in ``mm_token_type_ids``, where modalities share a placeholder token.
    """

    modality: str
    method: str
    values: str
    sizes: str | None
    patches: bool
    token: str
    token_type: int | None = None


@dataclass
class Items:
    """The items of one call, ``[patches, channels]`` or ``[items, ...]``, and their sizes, ``[items, 3 or frames]``."""

    kind: TowerKind
    values: Tensor
    sizes: Tensor | None

    @cached_property
    def grids(self) -> list[list[int]]:
        """Frames, height and width of each item in patches; empty where ``values`` has an entry per item."""
        return self.sizes.tolist() if self.kind.patches and self.sizes is not None else []

    @property
    def lengths(self) -> list[int]:
        """Rows of ``values`` that each item has."""
        return [math.prod(grid) for grid in self.grids] if self.kind.patches else [1] * len(self.values)

    def __len__(self) -> int:
        return len(self.grids) if self.kind.patches else len(self.values)

    def __getitem__(self, chosen: Sequence[int]) -> Items:
        """Return the items at the given places, in that order."""
        parts = self.values.split(self.lengths)
        values = torch.cat([parts[place] for place in chosen]) if chosen else self.values[:0]
        return Items(self.kind, values, None if self.sizes is None else self.sizes[list(chosen)])

    @property
    def costs(self) -> list[int]:
        """The cost of encoding each item, in patches: quadratic in a frame for attention, linear for the rest."""
        if not self.kind.patches:
            return [item.numel() for item in self.values]
        return [time * (rows * columns) ** 2 // 1024 + time * rows * columns for time, rows, columns in self.grids]


class TowerCall:
    """Replaces the method of an encoder's owner, ``encode``, and can encode any of its items.

    A call without an item encodes the smallest legal ``dummy`` and returns no feature of it: nothing is added anywhere,
    and yet every collective and every gradient of the encoder takes place. ``counts``, from items to the features of
    each, is needed only where the method returns them in one piece.

    Attributes:
        exchange: Encodes the items of rows that ranks share; None where rows are whole.
        balance: Spreads the items of all rows over ranks; None where each rank encodes its own.
        precomputed: Arguments for all items of the current batch that were computed from their sizes beforehand.
    """

    def __init__(
        self,
        encode: Callable[..., Any],
        kind: TowerKind,
        dummy: Callable[[torch.device], Items],
        counts: Callable[[Items], list[int]] | None = None,
    ) -> None:
        self.kind, self.dummy, self.counts = kind, dummy, counts
        self.exchange: Exchange | None = None
        self.balance: Balance | None = None
        self.precomputed: dict[str, Any] = {}
        self._encode, self._parameters = encode, inspect.signature(encode)
        self._absent: Tensor | None = None

    def stand_in(self, device: torch.device) -> Tensor:
        """Return a dummy to pass to the model as values; the call recognises it by identity."""
        self._absent = self.dummy(device).values
        return self._absent

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encode, as the owner's own method does."""
        if _encoding.get():
            return self._encode(*args, **kwargs)
        given = dict(self._parameters.bind(*args, **kwargs).arguments)
        given |= {name: value for name, value in given.pop("kwargs", {}).items() if name not in _TEXT_BOUNDARIES}
        values = given[self.kind.values]
        absent = values is self._absent and values is not None
        self._absent = None
        if not absent and self.exchange is None and self.balance is None:
            return self.encode(**(given | self.precomputed))
        # What a loader precomputed is of all items in their order, and so of no use to another choice of them.
        sizes = given.get(self.kind.sizes) if self.kind.sizes else None
        items = self.dummy(values.device)[[]] if absent else Items(self.kind, values, sizes)
        encoder, balance = _Encoder(self, given), self.balance
        encode: Encode = encoder if balance is None else lambda items: balance(items, encoder)
        if self.exchange is None:
            streams = [torch.cat(stream) for stream in encode(items)]
        else:
            streams = self.exchange(items, encode)
        return self._answer(encoder.output, streams)

    def encode(self, **arguments: Any) -> Any:
        """Call the owner's own method."""
        token = _encoding.set(True)
        try:
            return self._encode(**arguments)
        finally:
            _encoding.reset(token)

    def _answer(self, output: Any, streams: list[Tensor]) -> Any:
        """Put streams into an output in the form that the owner reads: one piece, or a tuple of pieces."""
        pooled, *layers = streams
        if _in_one_piece(self.kind, output):
            output.last_hidden_state = pooled
            return output
        output.pooler_output = pooled if isinstance(output.pooler_output, Tensor) else (pooled,)
        if layers:
            whole = isinstance(output.deepstack_features[0], Tensor)
            output.deepstack_features = layers if whole else [(layer,) for layer in layers]
        return output


class _Encoder:
    """Encodes any items in one call of the encoder, and keeps the output."""

    def __init__(self, call: TowerCall, arguments: dict[str, Any]) -> None:
        self.call, self.arguments = call, arguments
        self.output: Any = None

    def __call__(self, items: Items) -> list[list[Tensor]]:
        empty = not len(items)
        if empty:
            items = self.call.dummy(items.values.device)
        kind = self.call.kind
        given = {**self.arguments, kind.values: items.values}
        if kind.sizes is not None:
            given[kind.sizes] = items.sizes
        self.output = self.call.encode(**given)
        streams = self._streams(items)
        return [[piece[:0] for piece in stream] for stream in streams] if empty else streams

    def _streams(self, items: Items) -> list[list[Tensor]]:
        output = self.output
        pooled = output.last_hidden_state if _in_one_piece(self.call.kind, output) else output.pooler_output
        if isinstance(pooled, Tensor) and pooled.dim() == 2:
            assert self.call.counts is not None
            pooled = pooled.split(self.call.counts(items))
        streams = [list(pooled)]
        counts = [len(piece) for piece in streams[0]]
        for layer in getattr(output, "deepstack_features", None) or ():
            streams.append(list(layer.split(counts)) if isinstance(layer, Tensor) else list(layer))
        return streams


def _in_one_piece(kind: TowerKind, output: Any) -> bool:
    """Whether the owner reads features from the last hidden state: transformers' audio models do, and Llama 4."""
    read = kind.modality == "audio" or getattr(output, "pooler_output", None) is None
    return read and hasattr(output, "last_hidden_state")
