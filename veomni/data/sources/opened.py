"""Sources that can be read, and how several become one stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veomni.data.options import Mixing
from veomni.data.sources.blocks import Blocks, all_records
from veomni.data.sources.records import Document
from veomni.data.sources.schema import RecordSchema

if TYPE_CHECKING:
    from veomni.data.sources.dataset import IndexedDataset


@dataclass(frozen=True)
class OpenedSource:
    """A source that can be read.

    Attributes:
        name: What metrics and messages call it.
        weight: Its share of a mixture, relative to the other sources'.
        schema: What its records hold.
        blocks: Its records.
        fingerprint: Given the cache directory, returns what changes when the source does.
    """

    name: str
    weight: float
    schema: RecordSchema
    blocks: Sequence[Blocks]
    fingerprint: Callable[[Path], Mapping[str, Any]]

    def __iter__(self) -> Iterator[Document]:
        return map(self.schema.converted, all_records(self.blocks))


class DocumentStream:
    """Documents of one or several sources, and how these become one stream."""

    def __init__(self, sources: Sequence[OpenedSource], mixing: Mixing) -> None:
        self.sources, self.mixing = sources, mixing

    @property
    def indexed(self) -> IndexedDataset | None:
        """The same documents by index; None where they can only be streamed."""
        return None

    def __iter__(self) -> Iterator[Document]:
        """Yield all documents once, source by source, in order."""
        for source in self.sources:
            yield from source

    def texts(self) -> Iterator[str]:
        """Yield what a tokenizer is trained on: the text of every document, or of every message."""
        for source in self.sources:
            for document in source:
                yield from source.schema.type.texts(document, source.schema)

    def fingerprint(self, cache_dir: Path) -> dict[str, dict[str, Any]]:
        """Return, by source, what changes when it does, as JSON can hold it."""
        return {source.name: dict(source.fingerprint(cache_dir)) for source in self.sources}


def in_turn(sources: Sequence[OpenedSource]) -> Iterator[tuple[OpenedSource, Document]]:
    """Yield all documents once, one of each source after another, with their source."""
    for turn in zip_longest(*(zip(repeat(source), source, strict=False) for source in sources)):
        yield from (named for named in turn if named is not None)
