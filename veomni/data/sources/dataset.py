"""Documents of one or several sources: as a stream, or by index over one or many files, with a held-out part."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat, zip_longest
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Lt
from numpy.typing import NDArray
from typing_extensions import override

from veomni.data.options import Mixing
from veomni.data.packing.order import hashed_uniform
from veomni.data.sources.blocks import Blocks, Records
from veomni.data.sources.cache import cache_directory, digest, file_digest
from veomni.data.sources.locations import shown
from veomni.data.sources.opening import find_data
from veomni.data.sources.records import Document
from veomni.data.sources.schema import RecordSchema
from veomni.errors import DataError
from veomni.logging import create_logger

logger = create_logger(__name__)


@dataclass(frozen=True)
class OpenedSource:
    """A :class:`~veomni.data.DataSource` that can be read: by ``blocks`` of records.

    ``fingerprint`` returns, given the cache directory, what changes when the source does.
    """

    name: str
    weight: float
    schema: RecordSchema
    blocks: Sequence[Blocks]
    fingerprint: Callable[[Path], Mapping[str, Any]]

    def __iter__(self) -> Iterator[Document]:
        return map(self.schema.converted, chain.from_iterable(self.blocks))


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


class IndexedDataset(DocumentStream):
    """A map-style dataset: ``dataset[i]`` is a :class:`Document`, read on access.

    It is made of the documents of ``files`` at ``indices``, ascending. As a stream, it is one source called ``data``,
    shuffled record by record; by row groups within Parquet files.
    """

    def __init__(self, files: Sequence[tuple[Path, Records]], indices: NDArray[np.int64], schema: RecordSchema) -> None:
        self.schema, self.paths = schema, [path for path, _ in files]
        self._records, self._indices = [records for _, records in files], indices
        self._offsets = np.array([0, *accumulate(map(len, self._records))])
        parts = np.split(indices, np.searchsorted(indices, self._offsets[1:-1]))
        shares = zip(self._records, parts, self._offsets, strict=False)
        blocks = [records.blocks(part - first) for records, part, first in shares]
        super().__init__([OpenedSource("data", 1.0, schema, blocks, self._facts)], Mixing())

    @property
    @override
    def indexed(self) -> IndexedDataset:
        return self

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        position = int(self._indices[index])
        file = int(np.searchsorted(self._offsets, position, side="right")) - 1
        return self.schema.converted(self._records[file][position - int(self._offsets[file])])

    def _facts(self, cache_dir: Path) -> Mapping[str, Any]:
        files = [file_digest(path, cache_dir) for path in self.paths]
        chosen = hashlib.blake2b(self._indices.tobytes(), digest_size=16).hexdigest()
        held, content = sum(path.stat().st_size for path in self.paths), [files, chosen, *self.schema.facts()]
        return {"files": len(files), "bytes": held, "digest": digest(content)}


def build_dataset(
    paths: str | Sequence[str], schema: RecordSchema | None = None, *,
    max_documents: Annotated[int, Ge(1)] | None = None, eval_fraction: Annotated[float, Ge(0.0), Lt(1.0)] = 0.0,
    seed: int = 0, cache_dir: str | Path | None = None,
) -> tuple[IndexedDataset, IndexedDataset | None]:  # fmt: skip
    """Index the records of files, and return those to train on and the held-out ones, or None.

    Whether a document is held out depends on its index and ``seed`` alone, so appending data moves no document across.

    Args:
        paths: Files, directories, saved Hugging Face datasets, URLs, or names of built-in corpora (``CORPORA``).
        schema: What the records hold, and in which fields; None for text in the field ``text``.
        max_documents: Use only the first so many documents; None uses all.
        eval_fraction: Expected share of the training documents that is held out.
        seed: Seed of the held-out choice.
        cache_dir: Where copies of remote and compressed files are kept; None for ``$XDG_CACHE_HOME/veomni``.

    Raises:
        DataError: a path is missing, empty or unreadable, the first record lacks its field, or a part is empty.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    schema, cache, names = schema or RecordSchema(), cache_directory(cache_dir), ", ".join(map(shown, paths))
    found = [(file.kept_copy(cache), form) for path in paths for file, form in find_data(path, cache)]
    files = [(Path(copy.place), form.read(copy, schema)) for copy, form in found]
    total = sum(len(records) for _, records in files)
    if not total:
        raise DataError(f"{names or 'no path'}: no document in it", "give files with documents", "build_dataset.paths")
    indices = np.arange(total if max_documents is None else min(total, max_documents), dtype=np.int64)
    held_out = hashed_uniform(indices, "held-out", seed) < eval_fraction
    train, held = (IndexedDataset(files, indices[part], schema) for part in (~held_out, held_out))
    if eval_fraction and not (len(train) and len(held)):
        parts = f"{len(held)} held out, {len(train)} to train on"
        problem = f"eval_fraction {eval_fraction} of {len(indices)} documents leaves {parts}"
        raise DataError(problem, "change eval_fraction, or give held-out files", "build_dataset.eval_fraction")
    schema.check(train[0])  # a wrong field name is found now, not after the model is built
    logger.info_rank0("%s: %s documents%s", names, len(train), f", {len(held)} more held out" if eval_fraction else "")
    return train, held if eval_fraction else None
