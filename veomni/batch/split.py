"""Cut a micro-batch into the parts of the ranks that share its rows (Ulysses, context parallelism).

Everything that needs a whole row happens here, before the cut: labels are shifted, document borders found, rows padded.
It runs wherever the whole rows are: in a loader's worker, so that only this rank's part is sent to the training
process, or in the launcher, for batches of other loaders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veomni.batch.fields import FIELDS
from veomni.batch.micro_batch import IGNORE_INDEX, LOSS_WEIGHTS, SEQUENCE_SIZE, PackedInputs, document_lengths
from veomni.batch.shift import shift_left
from veomni.errors import DataError


@dataclass(frozen=True)
class SequenceShard:
    """Which positions of every row this rank holds.

    Attributes:
        ulysses: Ranks that exchange sequence for heads.
        ulysses_rank: This one's place among them.
        cp: Ranks of the attention ring; the row is dealt to them in a zigzag of ``2 * cp`` chunks.
        cp_rank: This one's place among them.
    """

    ulysses: int = 1
    ulysses_rank: int = 0
    cp: int = 1
    cp_rank: int = 0

    @property
    def size(self) -> int:
        """Ranks that share a row."""
        return self.ulysses * self.cp

    @property
    def multiple(self) -> int:
        """What the length of a row must be a multiple of."""
        return self.size if self.cp == 1 else 2 * self.size

    def indices(self, length: int) -> Tensor:
        """Return the positions that this rank holds, int64 ``[length / size]``, of a row of ``length``."""
        mine = torch.arange(length)
        if self.cp > 1:
            chunks = mine.chunk(2 * self.cp)
            mine = torch.cat([chunks[number] for number in zigzag_chunks(self.cp, self.cp_rank)])
        return mine.chunk(self.ulysses)[self.ulysses_rank]


def zigzag_chunks(size: int, rank: int) -> tuple[int, int]:
    """Return which of ``2 * size`` chunks of a row a rank of the attention ring holds: an early one and a late one."""
    return rank, 2 * size - 1 - rank


WHOLE_ROWS = SequenceShard()


def split_rows(inputs: Mapping[str, Any], shard: SequenceShard) -> PackedInputs:
    """Return this rank's part of a micro-batch.

    Args:
        inputs: Whole rows (``veomni/batch/micro_batch.py``); position ids may be ``[axes, batch, seq]``.
        shard: Which positions this rank holds.

    Returns:
        Tensors of one entry per token are cut; ``shift_labels`` holds the labels shifted on the whole row, and so does
        ``labels``; ``loss_weights`` are shifted with them; ``cu_seq_lens_q`` and ``cu_seq_lens_k`` stay those of the
        whole rows, with a padded tail as one more document, and are left out where every row is one document.

    Raises:
        DataError: there is a padding mask, a row is shorter than the number of ranks, or an unknown tensor has an entry
            per token.
    """
    whole = _whole_rows(inputs, shard)
    rows = _row_shape(whole)
    indices = shard.indices(rows[1])
    result = PackedInputs(whole)
    if isinstance(inputs, PackedInputs):
        result.like(inputs)
    result.document_lengths = document_lengths(inputs)
    result.row_lengths = _row_lengths(inputs)
    result.row_digest = _digest(inputs)
    for name in whole:
        if _is_cut(name):
            result[name] = whole[name][:, indices]
    result["position_ids"] = whole["position_ids"][..., indices]
    if "shift_labels" in result:
        result["labels"] = result["shift_labels"]
    result[SEQUENCE_SIZE] = shard.size
    return result


def token_mask(inputs: Mapping[str, Any], shard: SequenceShard) -> Tensor | None:
    """Return which of this rank's positions hold a token, bool ``[batch, seq]``; None where all of them do.

    Args:
        inputs: A micro-batch, whole or this rank's part of it.
        shard: Which positions of every row this rank holds.

    Raises:
        DataError: rows are padded, and nobody said where.
    """
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return None if bool(mask.all()) else mask.bool()
    documents = document_lengths(inputs)
    lengths = _row_lengths(inputs)
    if lengths is None and not documents:
        return None
    batch, held = _row_shape(inputs)
    positions = held * shard.size
    if lengths is None:
        raise _unknown_padding(documents, batch * positions)
    filled = torch.tensor(lengths)
    if bool((filled == positions).all()):
        return None
    return shard.indices(positions).expand(batch, -1) < filled[:, None]


def document_numbers(inputs: Mapping[str, Any], shard: SequenceShard) -> Tensor:
    """Return which of the batch's documents each of this rank's positions is in, int64 ``[batch, seq]``; -1 in padding.

    Args:
        inputs: A micro-batch, whole or this rank's part of it.
        shard: Which positions of every row this rank holds.

    Raises:
        DataError: rows are padded, and nobody said where.
    """
    batch, held = _row_shape(inputs)
    length, lengths, filled = held * shard.size, document_lengths(inputs), _row_lengths(inputs)
    if filled is None and len(lengths) == batch:  # padded on a side that nobody said
        return torch.arange(batch)[:, None].expand(batch, held)
    if filled is None and lengths:
        raise _unknown_padding(lengths, batch * length)
    numbers = torch.full((batch, length), -1)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    for row, tokens in enumerate(documents.split(filled) if filled else ()):
        numbers[row, : len(tokens)] = tokens
    return numbers[:, shard.indices(length)]


def _unknown_padding(documents: Sequence[int], positions: int) -> DataError:
    return DataError(
        f"the documents of a batch hold {sum(documents)} of its {positions} tokens, and it does not say which the "
        "others are",
        "give PackedInputs.row_lengths, the tokens of each row before its padded tail",
    )


def _row_lengths(inputs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the tokens of each row; None where padding is known to be there, but not where."""
    if getattr(inputs, "row_lengths", None) is not None:
        return inputs.row_lengths  # type: ignore[attr-defined]
    documents = document_lengths(inputs)
    if not documents:
        return None
    batch, length = _row_shape(inputs)
    return (length,) * batch if sum(documents) == batch * length else None


def _whole_rows(inputs: Mapping[str, Any], shard: SequenceShard) -> dict[str, Any]:
    """Check the rows, shift their labels, find their documents and pad them."""
    batch, length = _row_shape(inputs)
    _refuse(inputs, batch, length, shard)
    whole = dict(inputs)
    whole.pop("attention_mask", None)  # it is None
    if whole.get("labels") is not None and "shift_labels" not in whole:
        whole["shift_labels"] = shift_left(whole["labels"], IGNORE_INDEX)
        if LOSS_WEIGHTS in whole:
            whole[LOSS_WEIGHTS] = shift_left(whole[LOSS_WEIGHTS], FIELDS.get(LOSS_WEIGHTS).pad)
    if whole.get("position_ids") is None:
        whole["position_ids"] = torch.arange(length).expand(batch, length)
    borders = whole.get("cu_seq_lens_q")
    borders = _borders_of(whole["position_ids"]) if borders is None else borders
    tail = -length % shard.multiple
    if tail:
        borders = _padded_borders(borders, batch, length, tail)
        whole.update(_padded(whole, tail))
    if borders is not None and (tail or whole.get("cu_seq_lens_q") is None):
        longest = max(int(whole.get("max_length_q", 0)), int(borders.diff().max()))
        whole.update(cu_seq_lens_q=borders, cu_seq_lens_k=borders.clone(), max_length_q=longest, max_length_k=longest)
    return whole


def _is_cut(name: str) -> bool:
    """Whether a key has one entry per token ``[batch, seq, ...]``; position ids, which may have axes, are apart."""
    return name in FIELDS and FIELDS.get(name).per == "token" and name != "position_ids"


def _row_shape(inputs: Mapping[str, Any]) -> tuple[int, int]:
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            return int(inputs[name].shape[0]), int(inputs[name].shape[1])
    raise DataError(
        "the batch has neither input_ids nor inputs_embeds: its rows cannot be shared by several ranks",
        "set train.ulysses_parallel_size and train.context_parallel_size to 1",
    )


def _refuse(inputs: Mapping[str, Any], batch: int, length: int, shard: SequenceShard) -> None:
    if inputs.get("attention_mask") is not None:
        raise DataError(
            "the batch has an attention_mask, and rows that several ranks share must not be padded",
            "pack the documents (build_dataloader does) and leave attention_mask out",
        )
    if length < shard.multiple:
        raise DataError(
            f"a row of {length} tokens is too short for {shard.size} ranks: each needs a part of it",
            f"use rows of at least {shard.multiple} tokens (data.max_seq_len), or fewer ranks per row",
        )
    for name, value in inputs.items():
        per_token = isinstance(value, Tensor) and tuple(value.shape[:2]) == (batch, length)
        if per_token and name not in FIELDS:
            raise DataError(
                f"the batch holds {name} {list(value.shape)}, which nobody said how to split over ranks",
                "leave it out, or set train.ulysses_parallel_size and train.context_parallel_size to 1",
            )


def _borders_of(positions: Tensor) -> Tensor | None:
    """Return where documents start, int32 ``[documents + 1]`` over the flattened rows; None if each row is one."""
    rows = positions[0] if positions.dim() == 3 else positions
    starts = torch.diff(rows, prepend=rows[:, :1], dim=-1) != 1
    starts[:, 0] = True
    if int(starts.sum()) == len(rows):
        return None
    return F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=rows.numel()).to(torch.int32)


def _padded_borders(borders: Tensor | None, batch: int, length: int, tail: int) -> Tensor:
    ends = torch.arange(1, batch + 1)
    old = ends.new_zeros(1) if borders is None else borders.long()
    moved = old + old // length * tail
    new = torch.cat([moved, ends * (length + tail) - tail, ends * (length + tail)])
    return new.unique().to(torch.int32)


def _padded(whole: Mapping[str, Any], tail: int) -> dict[str, Tensor]:
    padded = {}
    for name, tensor in whole.items():
        if _is_cut(name) and tensor is not None:
            padded[name] = F.pad(tensor, [0, 0] * (tensor.dim() - 2) + [0, tail], value=FIELDS.get(name).pad)
    positions = whole["position_ids"]
    padded["position_ids"] = torch.cat([positions, torch.arange(tail).expand(*positions.shape[:-1], tail)], dim=-1)
    return padded


def _digest(inputs: Mapping[str, Any]) -> int:
    """Return a number that tells rows apart; cheap enough for every micro-batch."""
    values = inputs.get("input_ids")
    if values is None:
        values = inputs["inputs_embeds"].detach().float().sum(-1).view(torch.int32)
    flat = values.flatten().long()
    return int((flat * torch.arange(1, len(flat) + 1)).sum())
