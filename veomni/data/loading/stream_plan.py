"""All that decides the rows of a stream, and how its data is dealt to virtual shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from veomni.data.options import Mixing, Order, Packing
from veomni.data.sources.blocks import Blocks, Records
from veomni.data.sources.dataset import OpenedSource
from veomni.data.text.samples import SampleMaker


@dataclass(frozen=True)
class StreamPlan:
    """All that decides the rows of a stream: what is mixed, and how samples of it are made, packed and ordered.

    Sources are read ``passes`` times where ``mixing.stopping_strategy`` ends the stream by that.
    """

    sources: Sequence[OpenedSource]
    samples: SampleMaker
    packing: Packing
    order: Order
    mixing: Mixing
    passes: int

    @cached_property
    def units(self) -> list[Units]:
        """What the shards read of each source."""
        return [Units(source.blocks, self.order.stream_shards) for source in self.sources]


class Units:
    """Blocks dealt to virtual shards.

    Where there are few blocks for the shards, each is split into several units, so that shards have about equally much.
    """

    def __init__(self, blocks: Sequence[Blocks], shards: int) -> None:
        self._blocks, self.shards = blocks, shards
        whole = sum(part.count for part in blocks if not part.single)
        self._split = -(-4 * shards // whole) if whole and shards > 1 else 1
        counts = [part.count * (1 if part.single else self._split) for part in blocks]
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
        start, stop = (edge * len(records) // self._split for edge in (piece, piece + 1))
        return Records(stop - start, lambda index: records[start + index])
