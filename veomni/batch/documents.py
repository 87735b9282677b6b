"""The rows of a micro-batch: their documents, their padding, and which of their positions this rank holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from veomni.batch.split import WHOLE_ROWS, SequenceShard, boundaries_of, row_shape
from veomni.errors import DataError

_BOUNDARIES = "veomni_boundaries"


@dataclass(frozen=True)
class RowLayout:
    """How documents lie in rows.

    Attributes:
        document_lengths: Tokens of each document, without padding; throughput and FLOPs are counted from them.
        row_lengths: Tokens of each row before its padded tail; None where padding is not located.
        digest: Distinguishes the whole rows that this is a shard of; 0 for whole rows.
        shard: Which positions of the rows this rank holds.
        position_fractions: What position ids have beyond whole numbers, int32 ``[batch, seq, 3]`` in parts of 2^24;
            None where they are whole.
    """

    document_lengths: tuple[int, ...] = ()
    row_lengths: tuple[int, ...] | None = None
    digest: int = 0
    shard: SequenceShard = WHOLE_ROWS
    position_fractions: Tensor | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Any], *, position_fractions: Tensor | None = None) -> Self:
        """Return the layout of a batch that has none: every row is one document, padded where its mask is 0."""
        return cls(_lengths_of(inputs), position_fractions=position_fractions)


def _lengths_of(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return tuple(int(length) for length in mask.bool().sum(-1))
    ids = inputs.get("input_ids")
    if ids is None and isinstance(inputs.get("inputs_embeds"), Tensor):
        ids = inputs["inputs_embeds"][..., 0]
    if not isinstance(ids, Tensor) or ids.is_nested or not ids.dim():
        return ()
    return (int(ids.shape[-1]),) * (ids.numel() // max(1, int(ids.shape[-1])))


def find_boundaries(positions: Tensor) -> tuple[Tensor | None, int]:
    """Return where documents of packed rows begin, int32 ``[documents + 1]`` over the flattened rows, and the longest.

    It is None, and 0, where each row is one document. ``positions`` are ``[batch, seq]``, or ``[axes, batch, seq]``
    with text first. Of those on a device the host must wait for it, unless :func:`keep_boundaries` has examined them.
    """
    kept: tuple[Tensor | None, int] | None = getattr(positions, _BOUNDARIES, None)
    if kept is not None:
        return kept
    found = boundaries_of(positions)
    return found, 0 if found is None else int(found.diff().max())


def keep_boundaries(positions: Tensor, moved: Tensor) -> None:
    """Find the boundaries of ``positions`` on the host, and keep them on ``moved``, their copy on a device.

    They are those of this very tensor: changing it in place afterwards is unsupported, a changed copy has none.
    """
    if positions.dim() not in (2, 3) or not positions.numel():
        return
    if hasattr(positions, _BOUNDARIES):  # it may have been changed since it was moved from the host to the host
        delattr(positions, _BOUNDARIES)
    found, longest = find_boundaries(positions)
    if found is not None:
        held = found.pin_memory() if moved.device.type != "cpu" and positions.is_pinned() else found
        found = held.to(moved.device, non_blocking=True)
    setattr(moved, _BOUNDARIES, (found, longest))


def token_mask(inputs: Mapping[str, Any], rows: RowLayout) -> Tensor | None:
    """Return which of this rank's positions hold a token, bool ``[batch, seq]``; None where all of them do.

    Rows whose padding is not located are a DataError, here and in :func:`document_numbers`.
    """
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return None if bool(mask.all()) else mask.bool()
    if rows.row_lengths is None and not rows.document_lengths:
        return None
    batch, held = row_shape(inputs)
    positions = held * rows.shard.size
    lengths = located_row_lengths(rows, batch, positions)
    if lengths is None:
        raise _unknown_padding(rows, batch * positions)
    filled = torch.tensor(lengths)
    if bool((filled == positions).all()):
        return None
    return rows.shard.indices(positions).expand(batch, -1) < filled[:, None]


def document_numbers(inputs: Mapping[str, Any], rows: RowLayout) -> Tensor:
    """Return which document each of this rank's positions is in, int64 ``[batch, seq]``; -1 in padding."""
    batch, held = row_shape(inputs)
    length, lengths = held * rows.shard.size, rows.document_lengths
    filled = located_row_lengths(rows, batch, length)
    if filled is None and len(lengths) == batch:  # padded, on either side
        return torch.arange(batch)[:, None].expand(batch, held)
    if filled is None and lengths:
        raise _unknown_padding(rows, batch * length)
    numbers = torch.full((batch, length), -1)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    for row, tokens in enumerate(documents.split(filled) if filled else ()):
        numbers[row, : len(tokens)] = tokens
    return numbers[:, rows.shard.indices(length)]


def located_row_lengths(rows: RowLayout, batch: int, length: int) -> tuple[int, ...] | None:
    """Return the tokens of each of ``batch`` rows of ``length`` positions; None where there is padding somewhere."""
    if rows.row_lengths is not None or not rows.document_lengths:
        return rows.row_lengths
    return (length,) * batch if sum(rows.document_lengths) == batch * length else None


def _unknown_padding(rows: RowLayout, positions: int) -> DataError:
    held = sum(rows.document_lengths)
    return DataError(
        f"the documents of a batch hold {held} of its {positions} tokens, and it does not say which the others are",
        "give RowLayout.row_lengths, the tokens of each row before its padded tail",
    )
