"""Documents by index, over one or many files, with a held-out part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veomni.data.packing.order import hashed_uniform
from veomni.data.sources.blocks import Blocks, RowGroups, SingleRecords
from veomni.data.sources.cache import cache_directory
from veomni.data.sources.digests import digest, file_digest
from veomni.data.sources.files import ParquetFile, Source
from veomni.data.sources.locations import shown
from veomni.data.sources.opened import Mixing, OpenedSource
from veomni.data.sources.opening import open_sources
from veomni.data.sources.records import Document
from veomni.data.sources.schema import RecordSchema
from veomni.errors import DataError
from veomni.logging import create_logger

logger = create_logger(__name__)


class IndexedDataset:
    """A map-style dataset: ``dataset[i]`` is a :class:`Document`, read on access.

    Args:
        files: What it is made of, in order.
        indices: Which documents of ``files`` belong to it, ascending.
        schema: What its records hold, and in which fields.
    """

    mixing = Mixing()

    def __init__(self, files: Sequence[Source], indices: NDArray[np.int64], schema: RecordSchema) -> None:
        self._files, self._indices, self.schema = files, indices, schema
        self._offsets = np.array([0, *accumulate(len(file) for file in files)])

    @property
    def indexed(self) -> IndexedDataset:
        """The dataset itself: its documents can be read by index."""
        return self

    @property
    def sources(self) -> list[OpenedSource]:
        """The dataset as one source called ``data``."""
        return [self.source("data")]

    def source(self, name: str, weight: float = 1.0) -> OpenedSource:
        """Return the dataset as a source, shuffled record by record; by row groups within Parquet files."""
        return OpenedSource(name, weight, self.schema, self._blocks(), self._facts)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        position = int(self._indices[index])
        file = int(np.searchsorted(self._offsets, position, side="right")) - 1
        return self.schema.converted(self._files[file][position - int(self._offsets[file])])

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    @property
    def files(self) -> list[Path]:
        """All files the dataset is made of, in order."""
        return [path for file in self._files for path in file.files]

    def texts(self) -> Iterator[str]:
        """Yield what a tokenizer is trained on: the text of every document, or of every message.

        Raises:
            DataError: a record lacks its field, or holds the wrong kind of value.
        """
        for document in self:
            yield from self.schema.texts(document)

    def fingerprint(self, cache_dir: Path) -> str:
        """Return a digest of the files' contents, in order, of the chosen documents and of the schema."""
        files = [file_digest(path, cache_dir) for path in self.files]
        chosen = hashlib.blake2b(self._indices.tobytes(), digest_size=16).hexdigest()
        return digest([files, chosen, *self.schema.facts()])

    def _facts(self, cache_dir: Path) -> Mapping[str, Any]:
        sizes = [path.stat().st_size for path in self.files]
        return {"files": len(sizes), "bytes": sum(sizes), "digest": self.fingerprint(cache_dir)}

    def _blocks(self) -> list[Blocks]:
        blocks: list[Blocks] = []
        for file, first, last in zip(self._files, self._offsets, self._offsets[1:], strict=False):
            chosen = self._indices[slice(*np.searchsorted(self._indices, [first, last]))] - first
            if isinstance(file, ParquetFile):
                blocks.append(RowGroups(file.again, chosen))
            else:
                blocks.append(SingleRecords(file, chosen))
        return blocks


def build_dataset(
    paths: str | Sequence[str],
    schema: RecordSchema | None = None,
    *,
    max_documents: int | None = None,
    eval_fraction: float = 0.0,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> tuple[IndexedDataset, IndexedDataset | None]:
    """Index the records of files, and split off a held-out part.

    Whether a document is held out depends on its index and ``seed`` alone, so appending data moves no document across.

    Args:
        paths: Files, directories, saved Hugging Face datasets, URLs, or names of built-in corpora (``CORPORA``).
        schema: What the records hold, and in which fields; None for text in the field ``text``.
        max_documents: Use the first so many documents only.
        eval_fraction: Expected share of the documents that is held out; 0 holds nothing out.
        seed: Seed of the held-out choice.
        cache_dir: Where copies of remote and compressed files are kept; None for ``$XDG_CACHE_HOME/veomni``.

    Returns:
        The training dataset, and the held-out one or None.

    Raises:
        DataError: a path is missing, empty or unreadable, the first record lacks its field, or a part is empty.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    schema, cache, names = schema or RecordSchema(), cache_directory(cache_dir), ", ".join(map(shown, paths))
    files = [file for path in paths for file in open_sources(path, schema.text_key, schema.columns, cache)]
    total = sum(len(file) for file in files)
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
