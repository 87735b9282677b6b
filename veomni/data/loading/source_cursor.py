"""How far a virtual shard has come in a source, and the records that follow."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple

from veomni.data.loading.stream_plan import StreamPlan
from veomni.data.packing.order import Permutation
from veomni.data.sources.blocks import Records
from veomni.data.sources.records import Document
from veomni.data.text.samples import Ref, Sample
from veomni.errors import DataError
from veomni.logging import create_logger

logger = create_logger(__name__)

Place = tuple[int, int, int]  # epoch, unit, record: as in Ref
_EMPTY_EPOCHS = 64  # epochs without a sample, after which a shard counts as empty


@dataclass
class SourceProgress:
    """How far a shard has come in a source: times it was read whole, units read in this epoch, records of the next one.

    ``samples`` are records that became samples, over all epochs, with so many ``tokens``; ``dropped`` are records that
    were left out, ``lost`` tokens that were cut off.
    """

    epoch: int = 0
    unit: int = 0
    record: int = 0
    samples: int = 0
    tokens: int = 0
    dropped: int = 0
    lost: int = 0


class _Read(NamedTuple):
    """What a record became, at an epoch, unit and number of record."""

    place: Place
    samples: list[Sample]
    lost: int


class SourceCursor:
    """Reads a shard's part of the source ``index``, some records ahead of what was taken.

    Nothing comes after ``limit`` epochs. ``progress`` is where it starts, and is kept up to date.
    """

    def __init__(self, plan: StreamPlan, shard: int, index: int, limit: int | None, progress: SourceProgress) -> None:
        self.plan, self.shard, self.index, self.limit, self.progress = plan, shard, index, limit, progress
        self.source, self._units = plan.sources[index], plan.units[index]
        self._order: tuple[int, Permutation] = -1, Permutation(0, "")
        self._reads = self._read_on()
        self._next: deque[_Read] = deque()  # at most one
        self._last_used = progress.epoch

    def upcoming_epoch(self) -> int | None:
        """Return the epoch of the next record, or None where there is none."""
        if not self._next:
            self._next.extend(islice(self._reads, 1))
        return self._next[0].place[0] if self._next else None

    def take(self) -> list[Sample]:
        """Return the samples of the next record, which is there; none if it is left out."""
        assert self.upcoming_epoch() is not None
        read, progress = self._next.popleft(), self.progress
        progress.epoch, progress.unit, record = read.place
        progress.record = record + 1
        if not read.samples:
            self._count_dropped()
            return []
        progress.samples += 1
        progress.tokens += sum(sample.length for sample in read.samples)
        progress.lost += read.lost
        if read.lost:
            logger.warning_once("source %s: documents are truncated; source_counts() says how far", self.source.name)
        self._last_used = progress.epoch
        return read.samples

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

    def _read_on(self) -> Iterator[_Read]:
        """Yield what records become from where progress stands; some are encoded together."""
        records = self._walk()
        while found := list(islice(records, self.plan.samples.together)):
            self._check_epochs(found[0][0][0] - self._last_used)
            yield from self._made(found)

    def _walk(self) -> Iterator[tuple[Place, Document]]:
        """Yield records with their places, epoch after epoch."""
        found, unit, record = (epoch := self.progress.epoch), self.progress.unit, self.progress.record
        while self.limit is None or epoch < self.limit:
            for at in range(unit, self._units.of_shard(self.shard)):
                order, records = self._open(epoch, at)
                for number in range(record, len(records)):
                    found = epoch
                    yield (epoch, at, number), records[order[number]]
                record = 0
            epoch, unit, record = epoch + 1, 0, 0
            self._check_epochs(epoch - found)

    def _check_epochs(self, without: int) -> None:
        if without > _EMPTY_EPOCHS:
            shard = f"virtual shard {self.shard} of {self._units.shards}"
            problem = f"source {self.source.name!r}: no record of {shard} can be used"
            raise DataError(problem, "give it more records, or lower stream_shards", "Order.stream_shards")

    def _open(self, epoch: int, unit: int) -> tuple[Sequence[int] | Permutation, Records]:
        """Return the records of a unit and the order in which they are read."""
        name, plan = self.source.name, self.plan.order
        chosen = self.shard + unit * plan.stream_shards
        if plan.shuffle:
            if self._order[0] != epoch:
                self._order = epoch, Permutation(len(self._units), f"units of {name}", plan.seed, epoch)
            chosen = self._order[1][chosen]
        records = self._units.open(chosen)
        if not plan.shuffle or len(records) == 1:
            return range(len(records)), records
        return Permutation(len(records), f"records of {name}", plan.seed, epoch, chosen), records

    def _made(self, found: Sequence[tuple[Place, Document]]) -> Iterator[_Read]:
        documents = [self.source.schema.converted(document) for _, document in found]
        made = self.plan.samples.make(documents, self.index)
        for (place, document), one in zip(found, made, strict=True):
            samples = [Sample(**vars(piece), ref=Ref(self.index, *place, number), where=document.where)
                       for number, piece in enumerate(one.pieces)]  # fmt: skip
            yield _Read(place, samples, one.lost)

    def read_again(self, refs: Sequence[Ref]) -> dict[Ref, Sample]:
        """Return the samples that ``refs`` stand for; raises DataError if the source has changed."""
        found: list[tuple[Place, Document]] = []
        for (epoch, unit), numbers in groupby(sorted({ref[1:4] for ref in refs}), key=lambda place: place[:2]):
            order, records = self._open(epoch, unit)
            for place in numbers:
                if place[2] >= len(records):
                    raise DataError(f"source {self.source.name!r} has fewer records than before", "restore it")
                found.append((place, records[order[place[2]]]))
        return {sample.ref: sample for read in self._made(found) for sample in read.samples}
