"""Documents by index, over one or many files, with a held-out part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from veomni.data.packing.order import hashed_uniform
from veomni.data.sources.cache import cache_directory
from veomni.data.sources.files import Source
from veomni.data.sources.layout import RecordLayout
from veomni.data.sources.locations import shown
from veomni.data.sources.opening import open_sources
from veomni.data.sources.records import Document
from veomni.errors import DataError
from veomni.logging import create_logger

logger = create_logger(__name__)


class TextDataset:
    """A map-style dataset: ``dataset[i]`` is a :class:`Document`, read when asked for.

    Args:
        sources: What it is made of, in order.
        indices: Which documents of ``sources`` belong to it, ascending.
        layout: What its records hold, and where.
    """

    def __init__(self, sources: Sequence[Source], indices: NDArray[np.int64], layout: RecordLayout) -> None:
        self.sources, self.indices, self.layout = sources, indices, layout
        self.offsets = np.array([0, *accumulate(len(source) for source in sources)])

    @property
    def data_type(self) -> str:
        """Name of the transform that tokenises it."""
        return self.layout.data_type

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Document:
        position = int(self.indices[index])
        source = int(np.searchsorted(self.offsets, position, side="right")) - 1
        return self.layout.converted(self.sources[source][position - int(self.offsets[source])])

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    @property
    def files(self) -> list[Path]:
        """All files the dataset is made of, in order."""
        return [path for source in self.sources for path in source.files]

    def texts(self) -> Iterator[str]:
        """Yield what a tokenizer is trained on: the text of every document, or of every message.

        Raises:
            DataError: a record lacks its field, or holds the wrong kind of thing.
        """
        for document in self:
            yield from self.layout.texts(document)


def open_dataset(
    paths: Sequence[str],
    layout: RecordLayout,
    *,
    max_documents: int | None = None,
    eval_fraction: float = 0.0,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> tuple[TextDataset, TextDataset | None]:
    """Index all records of ``paths`` and split off a held-out part; see :func:`veomni.data.sources.build_dataset`."""
    cache, names = cache_directory(cache_dir), ", ".join(map(shown, paths))
    sources = [source for path in paths for source in open_sources(path, layout.text_key, layout.keys, cache)]
    total = sum(len(source) for source in sources)
    if not total:
        raise DataError(f"{names or 'data.train_path'}: no document in it", "point data.train_path at data")
    indices = np.arange(total if max_documents is None else min(total, max_documents), dtype=np.int64)
    held_out = hashed_uniform(indices, "held-out", seed) < eval_fraction
    train = TextDataset(sources, indices[~held_out], layout)
    held = TextDataset(sources, indices[held_out], layout)
    if eval_fraction and not (len(train) and len(held)):
        parts = f"{len(held)} held out, {len(train)} to train on"
        problem = f"data.eval_fraction {eval_fraction} of {len(indices)} documents leaves {parts}"
        raise DataError(problem, "change data.eval_fraction, or give data.eval_path")
    layout.check(train[0])  # a wrong field name is found now, not after the model is built
    logger.info_rank0("%s: %s documents%s", names, len(train), f", {len(held)} more held out" if eval_fraction else "")
    return train, held if eval_fraction else None
