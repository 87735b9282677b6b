"""One virtual shard of a stream: its share of every source, mixed, shuffled and packed, in an order of its own.

All it remembers is counters and indices: how far it has read each source, and where the samples come from that wait
for a row. Whoever puts those back gets the same rows, wherever the shard is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from veomni.data.loading.blocks import Records, Units
from veomni.data.packing.lookahead import LookAhead
from veomni.data.packing.order import Permutation, hashed_uniform
from veomni.data.sources.layout import RecordLayout
from veomni.data.sources.records import Document
from veomni.data.text.samples import Made, Ref, Row, Sample, SampleMaker
from veomni.errors import CheckpointError, DataError
from veomni.logging import create_logger

logger = create_logger(__name__)

_EMPTY_EPOCHS = 64  # without a sample, and a shard has nothing to give


@dataclass(frozen=True)
class StreamSource:
    """A source, dealt to shards.

    Attributes:
        name: For messages and metrics.
        units: Its records.
        layout: What they hold.
        weight: Its share of the mixture, relative to the others'; 0 leaves it out.
    """

    name: str
    units: Units
    layout: RecordLayout
    weight: float = 1.0


@dataclass(frozen=True)
class StreamPlan:
    """What a stream is made of: all that decides its rows.

    Attributes:
        sources: What is mixed.
        maker: Makes samples of records.
        shards: Number of virtual shards.
        seed: Decides the order of each epoch.
        shuffle: Otherwise sources are read in order.
        weigh_by: Whether weights are shares of the ``sample`` s or of the ``token`` s.
        stopping: When a shard ends: "first_exhausted", as soon as a source has been read ``passes`` times and is
            wanted again; "all_exhausted", when each has been read that often; "once" likewise, but none is read more
            often; "repeat", never.
        passes: See ``stopping``.
        capacity: Tokens of a row.
        media_capacity: Tokens of a row that may stand for media; None sets no bound.
        pack: Put several samples into a row.
        lookahead: Samples that a shard reads ahead to fill its rows from.
    """

    sources: Sequence[StreamSource]
    maker: SampleMaker
    shards: int
    seed: int
    shuffle: bool
    weigh_by: str
    stopping: str
    passes: int
    capacity: int
    media_capacity: int | None
    pack: bool
    lookahead: int


@dataclass
class SourceProgress:
    """How far a shard has come in a source.

    Attributes:
        epoch: Times it has been read whole.
        unit: Units read in this epoch.
        record: Records read of the next one.
        samples: Records that became samples, over all epochs.
        tokens: Their tokens.
        dropped: Records that were left out.
        lost: Tokens that were cut off.
    """

    epoch: int = 0
    unit: int = 0
    record: int = 0
    samples: int = 0
    tokens: int = 0
    dropped: int = 0
    lost: int = 0


@dataclass(frozen=True)
class _Read:
    epoch: int
    unit: int
    record: int
    where: str
    made: Made


@dataclass
class _Cursor:
    """Reads a shard's part of a source, some records ahead of what was taken."""

    plan: StreamPlan
    shard: int
    index: int
    limit: int | None  # epochs after which nothing comes
    progress: SourceProgress = field(default_factory=SourceProgress)

    def __post_init__(self) -> None:
        self.source = self.plan.sources[self.index]
        self._order: tuple[int, Permutation] = -1, Permutation(0, "")
        self._ahead: deque[_Read] = deque()
        self._records = self._walk()
        self._last_used = self.progress.epoch

    # ---------------------------------------------------------------- reading on

    def upcoming_epoch(self) -> int | None:
        """Return the epoch of the next record, or None where there is none."""
        if not self._ahead:
            self._read_ahead()
        return self._ahead[0].epoch if self._ahead else None

    def take(self) -> list[Sample]:
        """Return the samples of the next record, which is there; none if it is left out."""
        assert self.upcoming_epoch() is not None
        read, progress = self._ahead.popleft(), self.progress
        progress.epoch, progress.unit, progress.record = read.epoch, read.unit, read.record + 1
        samples = self._samples(read)
        if samples:
            progress.samples += 1
            progress.tokens += sum(sample.length for sample in samples)
            progress.lost += read.made.lost
            if read.made.lost:
                logger.warning_once("source %s: documents are truncated; source_counts() says by how much",
                                    self.source.name)  # fmt: skip
            self._last_used = read.epoch
        else:
            self._count_dropped()
            if read.epoch > self._last_used + _EMPTY_EPOCHS:
                raise self._useless("can be used")
        return samples

    def leave_out(self, sample: Sample) -> None:
        """Count a record that became a sample and cannot be used after all."""
        self.progress.samples -= 1
        self.progress.tokens -= sample.length
        self._count_dropped()

    def _count_dropped(self) -> None:
        self.progress.dropped += 1
        logger.warning_once(
            "source %s: records are left out (empty, too long, or with media that cannot be used); "
            "the loader's source_counts() and its state in checkpoints say how many", self.source.name,
        )  # fmt: skip

    def _samples(self, read: _Read) -> list[Sample]:
        place = (self.index, read.epoch, read.unit, read.record)
        return [Sample(piece, Ref(*place, number), read.where) for number, piece in enumerate(read.made.pieces)]

    def _read_ahead(self) -> None:
        places, documents = [], []
        for place, document in self._records:
            places.append(place)
            documents.append(document)
            if len(documents) == self.plan.maker.together:
                break
        for place, document, made in zip(places, documents, self._made(documents), strict=True):
            self._ahead.append(_Read(*place, document.where, made))

    def _made(self, documents: Sequence[Document]) -> list[Made]:
        converted = [self.source.layout.converted(document) for document in documents]
        return self.plan.maker.make(converted, self.index) if converted else []

    def _walk(self) -> Iterator[tuple[tuple[int, int, int], Document]]:
        """Yield records with their places from where progress stands, epoch after epoch."""
        epoch, unit, record = self.progress.epoch, self.progress.unit, self.progress.record
        units, empty = self.source.units.of_shard(self.shard), 0
        while self.limit is None or epoch < self.limit:
            empty += 1
            for at in range(unit, units):
                order, records = self._open(epoch, at)
                for number in range(record, len(records)):
                    empty = 0
                    yield (epoch, at, number), records[order[number]]
                record = 0
            epoch, unit, record = epoch + 1, 0, 0
            if empty == _EMPTY_EPOCHS:
                raise self._useless("is there")

    def _open(self, epoch: int, unit: int) -> tuple[Sequence[int] | Permutation, Records]:
        source, plan = self.source, self.plan
        chosen = self.shard + unit * plan.shards
        if plan.shuffle:
            if self._order[0] != epoch:
                self._order = epoch, Permutation(len(source.units), f"units of {source.name}", plan.seed, epoch)
            chosen = self._order[1][chosen]
        records = source.units.open(chosen)
        if not plan.shuffle or len(records) == 1:
            return range(len(records)), records
        return Permutation(len(records), f"records of {source.name}", plan.seed, epoch, chosen), records

    def _useless(self, verb: str) -> DataError:
        plan = self.plan
        problem = f"source {self.source.name!r}: no record of virtual shard {self.shard} of {plan.shards} {verb}"
        return DataError(problem, "give it more records, or lower data.stream_shards")

    # ---------------------------------------------------------------- going back

    def read_again(self, refs: Sequence[Ref]) -> dict[Ref, Sample]:
        """Return the samples that ``refs`` stand for.

        Raises:
            DataError: the source has changed.
        """
        found: dict[Ref, Sample] = {}
        for epoch, unit in sorted({(ref.epoch, ref.unit) for ref in refs}):
            order, records = self._open(epoch, unit)
            numbers = sorted({ref.record for ref in refs if (ref.epoch, ref.unit) == (epoch, unit)})
            if numbers[-1] >= len(records):
                raise DataError(f"source {self.source.name!r} has fewer records than before", "put it back as it was")
            documents = [records[order[number]] for number in numbers]
            for number, document, made in zip(numbers, documents, self._made(documents), strict=True):
                samples = self._samples(_Read(epoch, unit, number, document.where, made))
                found |= {sample.ref: sample for sample in samples}
        return found


class ShardReader:
    """Gives the rows of one virtual shard.

    Args:
        plan: What the stream is made of.
        shard: Which shard.
        state: From :meth:`state_dict`; None starts at the beginning.

    Raises:
        DataError: a source has changed since the state was taken.
    """

    def __init__(self, plan: StreamPlan, shard: int, state: Mapping[str, Any] | None = None) -> None:
        self.plan, self.shard = plan, shard
        self._mixed = [index for index, source in enumerate(plan.sources) if source.weight > 0]
        kept = {} if state is None else state["sources"]
        limit = plan.passes if len(self._mixed) == 1 or plan.stopping in ("first_exhausted", "once") else None
        self._cursors = {
            index: _Cursor(plan, shard, index, None if plan.stopping == "repeat" else limit,
                           SourceProgress(**kept.get(plan.sources[index].name, {})))
            for index in self._mixed
        }  # fmt: skip
        self._phase = hashed_uniform(np.arange(len(plan.sources)), "phase of sources", plan.seed, shard).tolist()
        self._waiting: LookAhead[Sample] = LookAhead(plan.capacity, plan.media_capacity, pack=plan.pack)
        self.rows = 0 if state is None else int(state["rows"])
        if state is not None:
            self._refill([Ref(*ref) for ref in state["waiting"]])

    @property
    def drained(self) -> bool:
        """Whether no row is left; reads ahead to know."""
        while len(self._waiting) < (self.plan.lookahead if self.plan.pack else 1):
            index = self._choose()
            if index is None:
                break
            for sample in self._cursors[index].take():
                self._waiting.add(sample)
        return not len(self._waiting)

    def next_row(self) -> Row | None:
        """Return the samples of the next row, or None when the shard has ended."""
        if self.drained:
            return None
        self.rows += 1
        row = []
        for sample in self._waiting.take_row():
            completed = self.plan.maker.complete(sample)
            if completed is None:
                self._cursors[sample.ref.source].leave_out(sample)
            else:
                row.append(completed)
        return row

    def _choose(self) -> int | None:
        """Return the source that is furthest behind its share, or None when the shard ends."""
        stopping = self.plan.stopping
        if stopping == "repeat":
            return self._furthest_behind(self._mixed)
        upcoming = {index: self._cursors[index].upcoming_epoch() for index in self._mixed}
        left = [index for index, epoch in upcoming.items() if epoch is not None and epoch < self.plan.passes]
        if not left:
            return None
        chosen = self._furthest_behind(left if stopping == "once" else self._mixed)
        return None if stopping == "first_exhausted" and chosen not in left else chosen

    def _furthest_behind(self, among: Sequence[int]) -> int:
        # Shards start at different phases of the same beat: their rows together then have the shares from the start.
        scale = self.plan.capacity if self.plan.weigh_by == "token" else 1

        def used(index: int) -> float:
            progress = self._cursors[index].progress
            amount = progress.tokens if self.plan.weigh_by == "token" else progress.samples
            return (amount + self._phase[index] * scale) / self.plan.sources[index].weight

        return min(among, key=used)

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return counters and indices."""
        return {
            "rows": self.rows,
            "ended": self.drained,
            "sources": {self.plan.sources[index].name: asdict(cursor.progress)
                        for index, cursor in self._cursors.items()},
            "waiting": [list(sample.ref) for sample in self._waiting],
        }  # fmt: skip

    def _refill(self, refs: Sequence[Ref]) -> None:
        found: dict[Ref, Sample] = {}
        for index in self._mixed:
            found |= self._cursors[index].read_again([ref for ref in refs if ref.source == index])
        for ref in refs:
            if ref not in found:
                name = self.plan.sources[ref.source].name if ref.source < len(self.plan.sources) else ref.source
                raise CheckpointError(f"source {name!r} has changed: a sample is gone", "put it back as it was")
            self._waiting.add(found[ref])
