"""Best-fit packing of a stream: rows are filled from the samples that were read ahead."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What can be packed."""

    @property
    def length(self) -> int:
        """Tokens."""

    @property
    def media(self) -> int:
        """Tokens that stand for images, videos and audio clips."""


S = TypeVar("S", bound=Sized)


class LookAhead(Generic[S]):
    """Samples that wait for a row.

    A row starts with the sample that has waited longest, so none waits for ever; then it takes the longest one that
    still fits, the older of two equal ones, until none fits.

    Args:
        capacity: Tokens of a row.
        media_capacity: Tokens of a row that may stand for media; None sets no bound. A sample with more of them gets a
            row in which nothing else has media.
        pack: Otherwise every sample has a row of its own.
    """

    def __init__(self, capacity: int, media_capacity: int | None = None, *, pack: bool = True) -> None:
        self.capacity, self.media_capacity, self.pack = capacity, media_capacity, pack
        self._waiting: dict[int, S] = {}  # in the order they came
        self._by_length: list[tuple[int, int]] = []  # (length, minus number): of equal ones the oldest comes last
        self._count = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[S]:
        return iter(self._waiting.values())

    def add(self, sample: S) -> None:
        """Let a sample of at most ``capacity`` tokens wait."""
        self._waiting[self._count] = sample
        insort(self._by_length, (sample.length, -self._count))
        self._count += 1

    def take_row(self) -> list[S]:
        """Take the samples of one row; there must be one that waits."""
        oldest = next(iter(self._waiting))
        place = bisect_left(self._by_length, (self._waiting[oldest].length, -oldest))
        row = [self._take(place)]
        if not self.pack:
            return row
        free = self.capacity - row[0].length
        media = None if self.media_capacity is None else max(0, self.media_capacity - row[0].media)
        while (place := self._fitting(free, media)) >= 0:
            row.append(self._take(place))
            free -= row[-1].length
            media = None if media is None else media - row[-1].media
        return row

    def _fitting(self, free: int, media: int | None) -> int:
        """Return the place of the longest sample that fits, or -1."""
        place = bisect_left(self._by_length, (free + 1, -self._count)) - 1
        while media is not None and place >= 0 and self._waiting[-self._by_length[place][1]].media > media:
            place -= 1
        return place

    def _take(self, place: int) -> S:
        _, number = self._by_length.pop(place)
        return self._waiting.pop(-number)
