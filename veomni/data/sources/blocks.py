"""Records by index and in blocks: what is indexed, and what a stream reads, shuffles and distributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from veomni.data.sources.records import Document


class Records:
    """Records that are made on access: ``read`` returns that of an index."""

    def __init__(self, count: int, read: Callable[[int], Document]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Document:
        return self._read(index)

    def blocks(self, chosen: NDArray[np.int64] | None = None) -> Blocks:
        """Return the chosen records, None for all, as blocks that can be read alone: here of one record each."""
        indices = np.arange(len(self)) if chosen is None else chosen
        return Blocks(len(indices), lambda block: Records(1, lambda _: self[int(indices[block])]), single=True)


@dataclass(frozen=True)
class Blocks:
    """Records in ``count`` blocks, each opened on its own; few blocks are split further, unless each is one record."""

    count: int
    open: Callable[[int], Records]
    single: bool = False

    def __iter__(self) -> Iterator[Document]:
        for block in range(self.count):
            records = self.open(block)
            yield from (records[index] for index in range(len(records)))
