"""All that decides the rows of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veomni.data.loading.options import Order, Packing
from veomni.data.loading.units import Units
from veomni.data.sources.opened import Mixing
from veomni.data.sources.schema import RecordSchema
from veomni.data.text.samples import SampleMaker


@dataclass(frozen=True)
class StreamSource:
    """A source, dealt to shards.

    Attributes:
        name: For messages and metrics.
        units: Its records.
        schema: What they hold.
        weight: Its share of the mixture, relative to the others'; 0 leaves it out.
    """

    name: str
    units: Units
    schema: RecordSchema
    weight: float = 1.0


@dataclass(frozen=True)
class StreamPlan:
    """All that decides the rows of a stream.

    Attributes:
        sources: What is mixed.
        samples: Makes samples of records.
        packing: How samples are put into rows.
        order: Number of virtual shards, and the order of each epoch.
        mixing: How sources are mixed, and when a shard ends.
        passes: How often sources are read, where ``mixing.stopping_strategy`` ends the stream by that.
    """

    sources: Sequence[StreamSource]
    samples: SampleMaker
    packing: Packing
    order: Order
    mixing: Mixing
    passes: int
