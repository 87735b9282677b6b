"""Records whose media cannot be used: left out, counted, and not without bound."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Annotated, TypeVar

from annotated_types import Ge

from veomni.errors import DataError, MediaError
from veomni.logging import create_logger

logger = create_logger(__name__)

S = TypeVar("S")
T = TypeVar("T")


class SkipBadMedia:
    """Gives None for a record whose media cannot be used, and says so.

    Only :class:`MediaError` is skipped: a malformed conversation is an error all the same. Worker processes that are
    started with it count together.

    Args:
        max_skipped: How many records may be left out before it is an error.
    """

    def __init__(self, max_skipped: Annotated[int, Ge(0)] = 100) -> None:
        self.max_skipped = max_skipped
        self._skipped = multiprocessing.get_context("spawn").Value("q", 0)

    @property
    def skipped(self) -> int:
        """Records left out so far, by all workers."""
        return int(self._skipped.value)

    def __call__(self, make: Callable[[S], T], given: S) -> T | None:
        """Return what is made, or None.

        Raises:
            DataError: the conversation is malformed, or more than ``max_skipped`` records were to be left out.
        """
        try:
            return make(given)
        except MediaError as error:
            with self._skipped.get_lock():
                self._skipped.value += 1
                skipped = self._skipped.value
            if skipped > self.max_skipped:
                problem = f"{skipped} records have media that cannot be used, the last one: {error.problem}"
                raise DataError(problem, "fix them, or raise max_skipped", "SkipBadMedia.max_skipped") from error
            logger.warning("left out record %s of at most %s: %s", skipped, self.max_skipped, error.problem)
            return None
