"""What a stream makes of records, and of the rows that its samples share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from veomni.batch.micro_batch import MicroBatch, Origin
from veomni.batch.split import SequenceShard
from veomni.data.options import Packing
from veomni.data.packing.rows import pack_rows
from veomni.data.sources.records import Document
from veomni.data.sources.schema import RecordSchema
from veomni.data.text.on_overflow import raise_overflow
from veomni.data.text.tokens import Tokens, padding_token
from veomni.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Ref(NamedTuple):
    """Where a sample comes from: all that is kept of one that waits for a row.

    These are the source, how often its shard has read it before, and the numbers of the unit in that epoch, the record
    in the unit (both in the order they are read), and the piece that the record was cut into.
    """

    source: int
    epoch: int
    unit: int
    record: int
    piece: int


@dataclass(frozen=True)
class Piece:
    """What fits a row: a document, a part of one, or a pair of documents.

    ``content`` are arrays, which travel between processes; before a sample is complete, what its maker completes it
    from. ``lengths`` are tokens of its documents, ``media`` those that stand for images, videos and audio. ``cost`` is
    work that grows with the square: of the documents' tokens and of each image's patches.
    """

    content: Any
    lengths: tuple[int, ...]
    media: int
    cost: int

    @property
    def length(self) -> int:
        """Tokens."""
        return sum(self.lengths)


class Made(NamedTuple):
    """What a record became: pieces, none of them if it is left out, and how many tokens were cut off."""

    pieces: list[Piece]
    lost: int = 0


@dataclass(frozen=True)
class Sample(Piece):
    """A piece in a stream, with its place there, and file and record for messages."""

    ref: Ref
    where: str


Row = list[Sample]


class SampleMaker(ABC):
    """Makes pieces of records, best ``together`` so many at once, and micro-batches of rows of samples."""

    together: int = 1

    @abstractmethod
    def make(self, documents: Sequence[Document], source: int) -> list[Made]:
        """Return what each record of a source becomes; DataError where one cannot be used, or is too long."""

    def complete(self, sample: Sample) -> Sample | None:
        """Return a sample that is to leave in a row, with all it holds; None if it cannot be used after all."""
        return sample

    @abstractmethod
    def collate(self, rows: Sequence[Row]) -> MicroBatch:
        """Return a micro-batch of rows of complete samples."""


class TextSamples(SampleMaker):
    """Makes samples of texts, conversations, token ids and preference pairs.

    ``chat_template`` is Jinja source, empty where no source holds conversations; ``shard`` which positions of the rows
    are given out.
    """

    together = 32

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, schemas: Sequence[RecordSchema], chat_template: str, packing: Packing,
        shard: SequenceShard,
    ) -> None:  # fmt: skip
        self._tokenizer, self._schemas, self._chat_template, self._shard = tokenizer, schemas, chat_template, shard
        self._packing, self._pad = packing, padding_token(tokenizer)
        unsplittable = [schema.data_type for schema in schemas if not (schema.type.splittable or schema.type.has_media)]
        if packing.on_overflow == "split" and unsplittable:
            problem = f"on_overflow split would cut {unsplittable[0]} records apart"
            raise ConfigError(problem, "use error, truncate or drop", "Packing.on_overflow")

    @override
    def make(self, documents: Sequence[Document], source: int) -> list[Made]:
        schema = self._schemas[source]
        encoded = schema.type.encode(documents, schema, self._tokenizer, self._chat_template)
        return [self._cut(one, document.where) for one, document in zip(encoded, documents, strict=True)]

    def _cut(self, documents: Sequence[Tokens], where: str) -> Made:
        if min(map(len, documents)) < 2:  # nothing follows the first token
            return Made([])
        capacity, policy = self._packing.max_seq_len, self._packing.on_overflow
        length = sum(map(len, documents))
        if length <= capacity:
            return Made([_piece(documents)])
        if policy == "error":
            raise_overflow(where, length, capacity)
        if policy == "drop":
            return Made([])
        if policy == "truncate":
            kept = [document[: capacity // len(documents)] for document in documents]
            return Made([_piece(kept)], length - sum(map(len, kept)))
        [whole] = documents
        return Made([_piece([whole[start : start + capacity]]) for start in range(0, length, capacity)])

    @override
    def collate(self, rows: Sequence[Row]) -> MicroBatch:
        documents = [[document for sample in row for document in sample.content] for row in rows]
        batch = name_documents(pack_rows(documents, self._packing.max_seq_len, self._pad), rows)
        if len(self._schemas) > 1:
            batch = replace(batch, targets=replace(batch.targets, source_ids=self._sources_of(rows)))
        return batch.split(self._shard)

    def _sources_of(self, rows: Sequence[Row]) -> Tensor:
        ids = np.full((len(rows), self._packing.max_seq_len), -1, np.int64)
        for number, row in enumerate(rows):
            sources = [sample.ref.source for sample in row for _ in range(sample.length)]
            ids[number, : len(sources)] = sources
        return torch.from_numpy(ids)


def _piece(documents: Sequence[Tokens]) -> Piece:
    lengths = tuple(map(len, documents))
    return Piece(documents, lengths, 0, sum(length * length for length in lengths))


def name_documents(batch: MicroBatch, rows: Sequence[Row]) -> MicroBatch:
    """Return a micro-batch with the origin of its documents."""
    samples = [sample for row in rows for sample in row]
    ids = tuple(name for sample in samples for name in _names(sample))
    sources = tuple(sample.ref.source for sample in samples for _ in sample.lengths)
    return replace(batch, origin=Origin(ids, sources))


def _names(sample: Sample) -> list[str]:
    name = f"{sample.ref.epoch}/{sample.where}" + (f", piece {sample.ref.piece + 1}" if sample.ref.piece else "")
    if len(sample.lengths) == 1:
        return [name]
    return [f"{name}, {side}" for side in ("chosen", "rejected")]
