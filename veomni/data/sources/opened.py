"""Sources that can be read, and how several become one stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veomni.data.sources.blocks import Blocks, all_records
from veomni.data.sources.records import Document
from veomni.data.sources.schema import RecordSchema
from veomni.errors import ConfigError
from veomni.registry import did_you_mean

SAMPLING = ("sample", "token")
STOPPING_STRATEGIES = ("repeat", "first_exhausted", "all_exhausted", "once")


@dataclass(frozen=True)
class Mixing:
    """How several sources become one stream.

    Attributes:
        sampling: Whether weights are shares of the ``sample`` s or of the ``token`` s.
        stopping_strategy: When the stream ends: ``repeat``, never; ``first_exhausted``, when a source has been read
            ``epochs`` times and is due again; ``all_exhausted``, when each has been read that often, shorter ones more
            often; ``once`` likewise, but no source is read more often.

    Raises:
        ConfigError: an option is unknown.
    """

    sampling: str = "sample"
    stopping_strategy: str = "repeat"

    def __post_init__(self) -> None:
        for key, known in (("sampling", SAMPLING), ("stopping_strategy", STOPPING_STRATEGIES)):
            if (value := getattr(self, key)) not in known:
                raise ConfigError(f"{key}: {value!r} is unknown", did_you_mean(value, list(known)))


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


def in_turn(sources: Sequence[OpenedSource]) -> Iterator[tuple[OpenedSource, Document]]:
    """Yield all documents once, one of each source after another, with their source."""
    readers = {source.name: iter(source) for source in sources}
    while readers:
        for source in sources:
            if source.name in readers:
                document = next(readers[source.name], None)
                if document is None:
                    del readers[source.name]
                else:
                    yield source, document
