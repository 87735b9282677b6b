"""Cut rows into the shards of the ranks that share them (Ulysses, context parallelism)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veomni.batch.fields import FIELDS, IGNORE_INDEX, shift_left
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


def split_fields(fields: Mapping[str, Any], shard: SequenceShard) -> dict[str, Any]:
    """Return this rank's shard of the fields of whole rows.

    What needs a whole row happens before the cut. It runs in a loader's worker, or in the launcher for other loaders.
    Tensors of one entry per token are cut; ``shift_labels`` holds the labels shifted on the whole row, and so does
    ``labels``; ``loss_weights`` are shifted with them; ``cu_seq_lens_q`` and ``cu_seq_lens_k`` stay those of the whole
    rows, with a padded tail as one more document, and are left out where every row is one document. Position ids may be
    ``[axes, batch, seq]``.

    Raises:
        DataError: there is a padding mask, a row is shorter than the number of ranks, or an unknown tensor has an entry
            per token.
    """
    result = _whole_rows(fields, shard)
    indices = shard.indices(row_shape(result)[1])
    for name in result:
        if _is_cut(name):
            result[name] = result[name][:, indices]
    result["position_ids"] = result["position_ids"][..., indices]
    if "shift_labels" in result:
        result["labels"] = result["shift_labels"]
    return result


def row_shape(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of rows and of positions of each; a DataError where there is no token sequence."""
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            return int(inputs[name].shape[0]), int(inputs[name].shape[1])
    raise DataError(
        "the batch has neither input_ids nor inputs_embeds: its rows cannot be shared by several ranks",
        "set Ulysses.size and ContextParallel.size to 1",
        field="Ulysses.size ContextParallel.size",
    )


def digest_of(inputs: Mapping[str, Any]) -> int:
    """Return a number that distinguishes rows; cheap enough for every micro-batch."""
    values = inputs.get("input_ids")
    if values is None:
        values = inputs["inputs_embeds"].detach().float().sum(-1).view(torch.int32)
    flat = values.flatten().long()
    return int((flat * torch.arange(1, len(flat) + 1)).sum())


def _whole_rows(inputs: Mapping[str, Any], shard: SequenceShard) -> dict[str, Any]:
    """Check the rows, shift their labels, find their documents and pad them."""
    batch, length = row_shape(inputs)
    _check_rows(inputs, batch, length, shard)
    whole = {name: value for name, value in inputs.items() if name != "attention_mask"}  # it is None
    if whole.get("labels") is not None and "shift_labels" not in whole:
        whole["shift_labels"] = shift_left(whole["labels"], IGNORE_INDEX)
        if "loss_weights" in whole:
            whole["loss_weights"] = shift_left(whole["loss_weights"], FIELDS.get("loss_weights").pad)
    if whole.get("position_ids") is None:
        whole["position_ids"] = torch.arange(length).expand(batch, length)
    given = whole.get("cu_seq_lens_q")
    boundaries = boundaries_of(whole["position_ids"]) if given is None else given
    tail = -length % shard.multiple
    if tail:
        boundaries = _padded_boundaries(boundaries, batch, length, tail)
        whole.update(_padded(whole, tail))
    if boundaries is not None and (tail or given is None):
        longest = max(int(whole.get("max_length_q", 0)), int(boundaries.diff().max()))
        whole |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries.clone()}
        whole |= {"max_length_q": longest, "max_length_k": longest}
    return whole


def _is_cut(name: str) -> bool:
    """Whether a key has one entry per token ``[batch, seq, ...]``; position ids, which may have axes, are apart."""
    return name in FIELDS and FIELDS.get(name).per == "token" and name != "position_ids"


def _check_rows(inputs: Mapping[str, Any], batch: int, length: int, shard: SequenceShard) -> None:
    if inputs.get("attention_mask") is not None:
        raise DataError(
            "the batch has an attention_mask, and rows that several ranks share must not be padded",
            "pack the documents (build_dataloader does) and leave attention_mask out",
        )
    if length < shard.multiple:
        raise DataError(
            f"a row of {length} tokens is too short for {shard.size} ranks: each needs a shard of it",
            f"use rows of at least {shard.multiple} tokens (max_seq_len), or fewer ranks per row",
            field="build_dataloader.max_seq_len",
        )
    for name, value in inputs.items():
        per_token = isinstance(value, Tensor) and tuple(value.shape[:2]) == (batch, length)
        if per_token and name not in FIELDS:
            raise DataError(
                f"the batch holds {name} {list(value.shape)}, which has no sharding rule",
                "leave it out, register it in veomni.batch.fields.FIELDS, or set "
                "Ulysses.size and ContextParallel.size to 1",
                field="Ulysses.size ContextParallel.size",
            )


def boundaries_of(positions: Tensor) -> Tensor | None:
    """Return where documents start, int32 ``[documents + 1]`` over the flattened rows; None if each row is one.

    Three axes are of one document each: time, height and width repeat within an image. A fourth, in front of them,
    counts the text.
    """
    if positions.dim() == 3 and len(positions) == 3:
        return None
    rows = positions[0] if positions.dim() == 3 else positions
    starts = torch.diff(rows, prepend=rows[:, :1], dim=-1) != 1
    starts[:, 0] = True
    if int(starts.sum()) == len(rows):
        return None
    return F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=rows.numel()).to(torch.int32)


def _padded_boundaries(boundaries: Tensor | None, batch: int, length: int, tail: int) -> Tensor:
    ends = torch.arange(1, batch + 1)
    old = ends.new_zeros(1) if boundaries is None else boundaries.long()
    moved = old + old // length * tail
    return torch.cat([moved, ends * (length + tail) - tail, ends * (length + tail)]).unique().to(torch.int32)


def _padded(whole: Mapping[str, Any], tail: int) -> dict[str, Tensor]:
    padded = {
        name: F.pad(tensor, [0, 0] * (tensor.dim() - 2) + [0, tail], value=FIELDS.get(name).pad)
        for name, tensor in whole.items() if _is_cut(name) and tensor is not None
    }  # fmt: skip
    positions = whole["position_ids"]
    padded["position_ids"] = torch.cat([positions, torch.arange(tail).expand(*positions.shape[:-1], tail)], dim=-1)
    return padded
