"""Several sources as one stream."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from veomni.data.options import Mixing, Sampling, StoppingStrategy
from veomni.data.sources.cache import cache_directory, digest
from veomni.data.sources.dataset import DocumentStream, OpenedSource, build_dataset
from veomni.data.sources.locations import shown
from veomni.data.sources.opening import find_data
from veomni.data.sources.schema import RecordSchema
from veomni.errors import ConfigError, DataError
from veomni.logging import create_logger

logger = create_logger(__name__)

_OPENED_TOGETHER = 16


@dataclass(frozen=True)
class DataSource:
    """A source of a mixture: files, directories or URLs.

    Metrics and messages use its ``name``, None for its paths; ``weight`` is relative to the other sources', 0 leaves it
    out.
    """

    path: str | Sequence[str]
    name: str | None = None
    weight: float = 1.0
    schema: RecordSchema = field(default_factory=RecordSchema)

    @property
    def paths(self) -> list[str]:
        """``path`` as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)

    @property
    def label(self) -> str:
        """Its name, or its paths."""
        return self.name or ", ".join(map(shown, self.paths))


def build_mixture(
    sources: Sequence[DataSource], *, streaming: bool = True, sampling: Sampling = "sample",
    stopping_strategy: StoppingStrategy = "repeat", cache_dir: str | Path | None = None,
) -> DocumentStream:  # fmt: skip
    """Return one or several sources as a stream, mixed as :class:`Mixing` says.

    With ``streaming``, files are opened block by block as they are needed; otherwise all are indexed first, which
    shuffles them record by record. Built-in corpora and copies of indexed remote and compressed files are kept in
    ``cache_dir``, None for ``$XDG_CACHE_HOME/veomni``.

    ConfigError where an option is unknown, two sources have one name, or weights sum to zero; DataError where a source
    cannot be read.
    """
    mixing, cache = Mixing(sampling, stopping_strategy), cache_directory(cache_dir)
    _check(sources)
    opened = [_streamed(source, cache) if streaming else _indexed(source, cache) for source in sources]
    for source in opened:
        logger.info_rank0("source %s: weight %s by %s", source.name, source.weight, sampling)
    return DocumentStream(opened, mixing)


def _check(sources: Sequence[DataSource]) -> None:
    if not sources:
        raise ConfigError("no source to mix", "name a source")
    labels = [source.label for source in sources]
    for source in sources:
        if labels.count(source.label) > 1:
            raise ConfigError(f"two sources are called {source.label!r}", "give each its own name")
        if not (math.isfinite(source.weight) and source.weight >= 0):
            raise ConfigError(f"source {source.label!r} has weight {source.weight}", "give a number of at least 0")
    if not any(source.weight for source in sources):
        raise ConfigError("the weights of the sources sum to zero", "give one source a weight above 0")


def _indexed(source: DataSource, cache: Path) -> OpenedSource:
    dataset, _ = build_dataset(source.paths, source.schema, cache_dir=cache)
    return replace(dataset.sources[0], name=source.label, weight=source.weight)


def _streamed(source: DataSource, cache: Path) -> OpenedSource:
    """Open a source none of whose files is read whole before it is needed; its first record is checked."""
    found = [named for path in source.paths for named in find_data(path, cache)]
    with ThreadPoolExecutor(_OPENED_TOGETHER) as threads:
        blocks = list(threads.map(lambda named: named[1].blocks(named[0], source.schema), found))

    def fingerprint(cache_dir: Path) -> dict[str, Any]:
        digests = [[file.relative, file.size, file.digest()] for file, _ in found]
        return {"files": len(found), "bytes": sum(file.size for file, _ in found), "digest": digest(digests)}

    opened = OpenedSource(source.label, source.weight, source.schema, blocks, fingerprint)
    first = next(iter(opened), None)
    if first is None:
        raise DataError(f"{opened.name}: no document in it", "point it at data, or leave the source out")
    source.schema.check(first)
    return opened
