"""Several sources as one stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from veomni.data.loading.blocks import Blocks, all_records, dataset_blocks, stream_blocks
from veomni.data.sources.cache import cache_directory
from veomni.data.sources.dataset import TextDataset, open_dataset
from veomni.data.sources.digests import dataset_digest, digest
from veomni.data.sources.layout import RecordLayout
from veomni.data.sources.locations import shown
from veomni.data.sources.opening import find_data
from veomni.data.sources.records import Document
from veomni.errors import ConfigError, DataError
from veomni.logging import create_logger
from veomni.registry import did_you_mean

logger = create_logger(__name__)

WEIGH_BY = ("sample", "token")
STOPPING = ("repeat", "first_exhausted", "all_exhausted", "once")


@dataclass(frozen=True)
class DataSource:
    """A source of a mixture, as people name it.

    Attributes:
        path: File, directory, URL, or several.
        name: What metrics and messages call it; None for its path.
        weight: Its share, relative to the other sources'; 0 leaves it out.
        data_type: What its records are: a registered transform, or ``multimodal``.
        format: How they hold conversations.
        text_key: Field of the text.
        messages_key: Field of the messages.
    """

    path: str | Sequence[str]
    name: str | None = None
    weight: float = 1.0
    data_type: str = "plaintext"
    format: str = "messages"
    text_key: str = "text"
    messages_key: str = "messages"

    @property
    def paths(self) -> list[str]:
        """Its paths."""
        return [self.path] if isinstance(self.path, str) else list(self.path)

    @property
    def layout(self) -> RecordLayout:
        """What its records hold."""
        return RecordLayout(self.data_type, self.format, self.text_key, self.messages_key)


@dataclass(frozen=True)
class OpenedSource:
    """A source of a mixture that can be read.

    Attributes:
        name: See :class:`DataSource`.
        weight: See :class:`DataSource`.
        layout: What its records hold.
        blocks: Its records.
        facts: Given the cache directory, returns what changes when the source does.
    """

    name: str
    weight: float
    layout: RecordLayout
    blocks: Sequence[Blocks]
    facts: Callable[[Path], Mapping[str, Any]]


class Mixture:
    """A dataset that is read as a stream: one or several sources, mixed by weight.

    Args:
        sources: What is mixed.
        weigh_by: Whether weights are shares of samples or of tokens.
        stopping: When it ends; see :class:`veomni.data.loading.shard_reader.StreamPlan`.

    Raises:
        ConfigError: an option is unknown, two sources have one name, or weights sum to zero.
    """

    def __init__(self, sources: Sequence[OpenedSource], *, weigh_by: str = "sample", stopping: str = "repeat") -> None:
        self.sources, self.weigh_by, self.stopping = list(sources), weigh_by, stopping
        for key, value, known in (("weigh_by", weigh_by, WEIGH_BY), ("stopping", stopping, STOPPING)):
            if value not in known:
                raise ConfigError(f"data.{key}: {value!r} is unknown", did_you_mean(value, list(known)))
        names = [source.name for source in self.sources]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"data.sources: two sources are called {twice!r}", "give each a name of its own")
        check_weights({source.name: source.weight for source in self.sources})

    @property
    def data_type(self) -> str:
        """What its records become: ``multimodal`` where a source holds media, else that of the first."""
        kinds = [source.layout.data_type for source in self.sources]
        return "multimodal" if "multimodal" in kinds else kinds[0]

    def __iter__(self) -> Iterator[Document]:
        """Yield all documents once, source by source, in order."""
        for source in self.sources:
            yield from map(source.layout.converted, all_records(source.blocks))

    def in_turn(self) -> Iterator[tuple[OpenedSource, Document]]:
        """Yield all documents once, one of each source after another, with where they come from."""
        readers = {source.name: map(source.layout.converted, all_records(source.blocks)) for source in self.sources}
        while readers:
            for source in self.sources:
                if source.name in readers:
                    document = next(readers[source.name], None)
                    if document is None:
                        del readers[source.name]
                    else:
                        yield source, document

    def texts(self) -> Iterator[str]:
        """Yield what a tokenizer is trained on, source by source."""
        for source in self.sources:
            for document in all_records(source.blocks):
                yield from source.layout.texts(source.layout.converted(document))

    def facts(self, cache_dir: Path) -> dict[str, Any]:
        """Return, by source, what changes when it does."""
        return {source.name: dict(source.facts(cache_dir)) for source in self.sources}


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ConfigError unless there are sources, each with a weight of at least 0, and one with more."""
    if not weights:
        raise ConfigError("data.sources is empty", "name a source")
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"data.sources: {name!r} has weight {weight}", "give a number of at least 0")
    if not any(weights.values()):
        raise ConfigError("data.sources: the weights sum to zero", "give one source a weight above 0")


def open_streamed(source: DataSource, cache_dir: str | Path | None = None) -> OpenedSource:
    """Open a source none of whose files is read whole before it is needed.

    Args:
        source: What is opened.
        cache_dir: Where built-in corpora are kept.

    Raises:
        DataError: it is not there, has no record, or its first record lacks a field.
    """
    layout, cache = source.layout, cache_directory(cache_dir)
    found = [find_data(path, cache) for path in source.paths]
    blocks = [block for one in found for block in stream_blocks(one, source.text_key, layout.keys)]
    files = [file for one in found for file in one.files]
    name = source.name or ", ".join(map(shown, source.paths))

    def facts(cache_dir: Path) -> dict[str, Any]:
        digests = [[file.relative, file.size, file.digest()] for file in files]
        return {"files": len(files), "bytes": sum(file.size for file in files), "digest": digest(digests)}

    return _checked(OpenedSource(name, source.weight, layout, blocks, facts))


def opened_dataset(dataset: TextDataset, name: str, weight: float = 1.0) -> OpenedSource:
    """Return a map-style dataset as a source: its records are shuffled one by one, however they lie in files."""

    def facts(cache_dir: Path) -> dict[str, Any]:
        files, sizes = dataset.files, [path.stat().st_size for path in dataset.files]
        return {"files": len(files), "bytes": sum(sizes), "digest": dataset_digest(dataset, cache_dir)}

    return OpenedSource(name, weight, dataset.layout, dataset_blocks(dataset), facts)


def _checked(source: OpenedSource) -> OpenedSource:
    first = next(islice(all_records(source.blocks), 1), None)
    if first is None:
        raise DataError(f"{source.name}: no document in it", "point it at data, or leave the source out")
    source.layout.check(source.layout.converted(first))
    return source


def build_mixture(
    sources: Sequence[DataSource],
    *,
    streaming: bool,
    weigh_by: str = "sample",
    stopping: str = "repeat",
    cache_dir: str | Path | None = None,
) -> Mixture:
    """Return sources as one stream.

    Args:
        sources: What is mixed.
        streaming: Open files block by block as they are needed; otherwise all are indexed first, which shuffles them
            record by record.
        weigh_by: Whether weights are shares of samples or of tokens.
        stopping: "repeat", "first_exhausted", "all_exhausted" or "once".
        cache_dir: Where copies of remote and compressed files are kept, where they are indexed.

    Raises:
        ConfigError: an option is unknown, two sources have one name, or weights sum to zero.
        DataError: a source cannot be read.
    """
    check_weights({source.name or str(source.path): source.weight for source in sources})
    opened = [open_streamed(source, cache_dir) if streaming else _indexed(source, cache_dir) for source in sources]
    mixture = Mixture(opened, weigh_by=weigh_by, stopping=stopping)
    for source in mixture.sources:
        logger.info_rank0("source %s: weight %s by %s", source.name, source.weight, weigh_by)
    return mixture


def _indexed(source: DataSource, cache_dir: str | Path | None) -> OpenedSource:
    dataset, _ = open_dataset(source.paths, source.layout, cache_dir=cache_dir)
    return opened_dataset(dataset, source.name or ", ".join(map(shown, source.paths)), source.weight)
