"""Best-fit packing of a stream: rows are filled from the samples that were read ahead."""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator

from veomni.data.text.samples import Sample


class LookAhead:
    """Samples that wait for a row.

    A row of ``capacity`` tokens starts with the sample that has waited longest, so none waits for ever; then it takes
    the longest one that still fits, the older of two equal ones, until none fits; without ``pack`` it ends there. At
    most ``media_capacity`` of its tokens stand for media, None sets no bound; a sample with more of them gets a row in
    which nothing else has media.
    """

    def __init__(self, capacity: int, media_capacity: int | None = None, *, pack: bool = True) -> None:
        self.capacity, self.pack = capacity, pack
        self.media_capacity = math.inf if media_capacity is None else media_capacity
        self._waiting: dict[int, Sample] = {}  # in the order they came
        self._by_length: list[tuple[int, int]] = []  # (length, minus number): of equal ones the oldest comes last
        self._count = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._waiting.values())

    def add(self, sample: Sample) -> None:
        """Let a sample of at most ``capacity`` tokens wait."""
        self._waiting[self._count] = sample
        insort(self._by_length, (sample.length, -self._count))
        self._count += 1

    def take_row(self) -> list[Sample]:
        """Take the samples of one row; there must be one that waits."""
        oldest = next(iter(self._waiting))
        place = bisect_left(self._by_length, (self._waiting[oldest].length, -oldest))
        row, free, media = list[Sample](), self.capacity, self.media_capacity
        while place >= 0 and (self.pack or not row):
            row.append(self._waiting.pop(-self._by_length.pop(place)[1]))
            free, media = free - row[-1].length, max(0, media - row[-1].media)
            place = self._fitting(free, media)
        return row

    def _fitting(self, free: int, media: float) -> int:
        """Return the place of the longest sample that fits, or -1."""
        place = bisect_left(self._by_length, (free + 1, -self._count)) - 1
        while place >= 0 and self._waiting[-self._by_length[place][1]].media > media:
            place -= 1
        return place
