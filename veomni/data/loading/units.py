"""Blocks of data dealt to the virtual shards of a stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from veomni.data.sources.blocks import Blocks, LazyRecords, Records


class Units:
    """Blocks dealt to virtual shards: what each of them reads in an epoch, and in which order.

    Where there are few blocks for the shards, each is split into several units, so that shards have about equally much.

    Args:
        blocks: The data.
        shards: Number of virtual shards.
    """

    def __init__(self, blocks: Sequence[Blocks], shards: int) -> None:
        self._blocks, self.shards = blocks, shards
        whole = sum(len(part) for part in blocks if not part.single)
        self._split = -(-4 * shards // whole) if whole and shards > 1 else 1
        counts = [len(part) * (1 if part.single else self._split) for part in blocks]
        self._offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def of_shard(self, shard: int) -> int:
        """Return how many units a shard reads in an epoch."""
        return max(0, -(-(len(self) - shard) // self.shards))

    def open(self, unit: int) -> Records:
        """Return the records of a unit."""
        part = int(np.searchsorted(self._offsets, unit, side="right")) - 1
        blocks, place = self._blocks[part], unit - int(self._offsets[part])
        if blocks.single:
            return blocks.open(place)
        block, piece = divmod(place, self._split)
        records = blocks.open(block)
        count = len(records)
        start, stop = piece * count // self._split, (piece + 1) * count // self._split
        return LazyRecords(stop - start, lambda index: records[start + index])
