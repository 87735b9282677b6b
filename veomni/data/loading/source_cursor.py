"""How far a virtual shard has come in a source, and the records that follow."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from veomni.data.loading.stream_plan import StreamPlan
from veomni.data.packing.order import Permutation
from veomni.data.sources.blocks import Records
from veomni.data.sources.records import Document
from veomni.data.text.samples import Made, Ref, Sample
from veomni.errors import DataError
from veomni.logging import create_logger

logger = create_logger(__name__)

_EMPTY_EPOCHS = 64  # epochs without a sample, after which a shard counts as empty


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
class SourceCursor:
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
            if len(documents) == self.plan.samples.together:
                break
        for place, document, made in zip(places, documents, self._made(documents), strict=True):
            self._ahead.append(_Read(*place, document.where, made))

    def _made(self, documents: Sequence[Document]) -> list[Made]:
        converted = [self.source.schema.converted(document) for document in documents]
        return self.plan.samples.make(converted, self.index) if converted else []

    def _walk(self) -> Iterator[tuple[tuple[int, int, int], Document]]:
        """Yield records with their places from where progress stands, epoch after epoch."""
        epoch, unit, record = self.progress.epoch, self.progress.unit, self.progress.record
        units, empty = self.plan.units[self.index].of_shard(self.shard), 0
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
        source, units, plan = self.source, self.plan.units[self.index], self.plan.order
        chosen = self.shard + unit * plan.stream_shards
        if plan.shuffle:
            if self._order[0] != epoch:
                self._order = epoch, Permutation(len(units), f"units of {source.name}", plan.seed, epoch)
            chosen = self._order[1][chosen]
        records = units.open(chosen)
        if not plan.shuffle or len(records) == 1:
            return range(len(records)), records
        return Permutation(len(records), f"records of {source.name}", plan.seed, epoch, chosen), records

    def _useless(self, verb: str) -> DataError:
        shards = self.plan.order.stream_shards
        problem = f"source {self.source.name!r}: no record of virtual shard {self.shard} of {shards} {verb}"
        return DataError(problem, "give it more records, or lower stream_shards", "Order.stream_shards")

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
                raise DataError(f"source {self.source.name!r} has fewer records than before", "restore it")
            documents = [records[order[number]] for number in numbers]
            for number, document, made in zip(numbers, documents, self._made(documents), strict=True):
                samples = self._samples(_Read(epoch, unit, number, document.where, made))
                found |= {sample.ref: sample for sample in samples}
        return found
