"""Several sources as one stream."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from veomni.data.sources.blocks import stream_blocks
from veomni.data.sources.cache import cache_directory
from veomni.data.sources.dataset import build_dataset
from veomni.data.sources.digests import digest
from veomni.data.sources.locations import shown
from veomni.data.sources.opened import Mixing, OpenedSource
from veomni.data.sources.opening import find_data
from veomni.data.sources.records import Document
from veomni.data.sources.schema import RecordSchema
from veomni.errors import ConfigError, DataError
from veomni.logging import create_logger

logger = create_logger(__name__)


@dataclass(frozen=True)
class DataSource:
    """A source of a mixture.

    Attributes:
        path: File, directory, URL, or several.
        name: What metrics and messages call it; None for its path.
        weight: Its share, relative to the other sources'; 0 leaves it out.
        schema: What its records hold, and in which fields.
    """

    path: str | Sequence[str]
    name: str | None = None
    weight: float = 1.0
    schema: RecordSchema = field(default_factory=RecordSchema)

    @property
    def paths(self) -> list[str]:
        """Its paths."""
        return [self.path] if isinstance(self.path, str) else list(self.path)

    @property
    def label(self) -> str:
        """Its name, or its paths."""
        return self.name or ", ".join(map(shown, self.paths))


class Mixture:
    """A dataset that is read as a stream: one or several sources, mixed by weight.

    Args:
        sources: What is mixed.
        mixing: How.

    Raises:
        ConfigError: two sources have one name, or weights sum to zero.
    """

    indexed = None

    def __init__(self, sources: Sequence[OpenedSource], mixing: Mixing | None = None) -> None:
        self.sources, self.mixing = list(sources), mixing or Mixing()
        names = [source.name for source in self.sources]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"two sources are called {twice!r}", "give each its own name")
        _check_weights({source.name: source.weight for source in self.sources})

    def __iter__(self) -> Iterator[Document]:
        """Yield all documents once, source by source, in order."""
        for source in self.sources:
            yield from source

    def texts(self) -> Iterator[str]:
        """Yield what a tokenizer is trained on, source by source."""
        for source in self.sources:
            for document in source:
                yield from source.schema.texts(document)

    def fingerprint(self, cache_dir: Path) -> dict[str, Any]:
        """Return, by source, what changes when it does."""
        return {source.name: dict(source.fingerprint(cache_dir)) for source in self.sources}


def build_mixture(
    sources: Sequence[DataSource],
    *,
    streaming: bool = True,
    sampling: str = "sample",
    stopping_strategy: str = "repeat",
    cache_dir: str | Path | None = None,
) -> Mixture:
    """Return one or several sources as a stream.

    Args:
        sources: What is mixed.
        streaming: Open files block by block as they are needed; otherwise all are indexed first, which shuffles them
            record by record.
        sampling: See :class:`Mixing`.
        stopping_strategy: See :class:`Mixing`.
        cache_dir: Where built-in corpora and copies of indexed remote and compressed files are kept; None for
            ``$XDG_CACHE_HOME/veomni``.

    Raises:
        ConfigError: an option is unknown, two sources have one name, or weights sum to zero.
        DataError: a source cannot be read.
    """
    mixing = Mixing(sampling, stopping_strategy)
    _check_weights({source.label: source.weight for source in sources})
    opened = [_streamed(source, cache_dir) if streaming else _indexed(source, cache_dir) for source in sources]
    for source in opened:
        logger.info_rank0("source %s: weight %s by %s", source.name, source.weight, sampling)
    return Mixture(opened, mixing)


def _check_weights(weights: Mapping[str, float]) -> None:
    if not weights:
        raise ConfigError("no source to mix", "name a source")
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"source {name!r} has weight {weight}", "give a number of at least 0")
    if not any(weights.values()):
        raise ConfigError("the weights of the sources sum to zero", "give one source a weight above 0")


def _indexed(source: DataSource, cache_dir: str | Path | None) -> OpenedSource:
    dataset, _ = build_dataset(source.paths, source.schema, cache_dir=cache_dir)
    return dataset.source(source.label, source.weight)


def _streamed(source: DataSource, cache_dir: str | Path | None) -> OpenedSource:
    """Open a source none of whose files is read whole before it is needed; its first record is checked."""
    schema, cache = source.schema, cache_directory(cache_dir)
    found = [find_data(path, cache) for path in source.paths]
    blocks = [block for one in found for block in stream_blocks(one, schema.text_key, schema.columns)]
    files = [file for one in found for file in one.files]

    def fingerprint(cache_dir: Path) -> dict[str, Any]:
        digests = [[file.relative, file.size, file.digest()] for file in files]
        return {"files": len(files), "bytes": sum(file.size for file in files), "digest": digest(digests)}

    opened = OpenedSource(source.label, source.weight, schema, blocks, fingerprint)
    first = next(islice(opened, 1), None)
    if first is None:
        raise DataError(f"{opened.name}: no document in it", "point it at data, or leave the source out")
    schema.check(first)
    return opened
