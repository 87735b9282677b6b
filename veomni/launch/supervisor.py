"""Watch the ranks of this node: pass signals on, and when one dies end the others."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import FrameType

from veomni.errors import EXIT_PREEMPTED
from veomni.launch.rank_process import RankProcess
from veomni.launch.verdict import RankEnd, Verdict, judge
from veomni.logging import create_logger

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
URGENT = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 5.0
_KILL_SECONDS = 4.0  # grace and this together stay below the ten seconds in which all ranks must be gone
_POLL_SECONDS = 0.02

logger = create_logger(__name__)


@contextlib.contextmanager
def collected_signals() -> Iterator[deque[signal.Signals]]:
    """Collect the signals to pass on, in order of arrival; those ignored from the start (``nohup``) stay ignored."""
    arrived: deque[signal.Signals] = deque()

    def collect(number: int, frame: FrameType | None) -> None:
        arrived.append(signal.Signals(number))

    previous = {number: signal.getsignal(number) for number in FORWARDED}
    kept = {number: handler for number, handler in previous.items() if handler is not signal.SIG_IGN}
    for number in kept:
        signal.signal(number, collect)
    try:
        yield arrived
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


class Supervisor:
    """Wait for ranks that have been started.

    Args:
        ranks: The processes.
        signals: Where signals to pass on arrive, as :func:`collected_signals` gives it.
    """

    def __init__(self, ranks: Sequence[RankProcess], signals: deque[signal.Signals]) -> None:
        self._ranks = ranks
        self._signals = signals
        self._asked_to_stop = False
        self._kill_at: float | None = None

    def run(self) -> Verdict:
        """Return the verdict once every rank is gone."""
        while any(rank.poll() is None for rank in self._ranks):
            self._pass_signals_on()
            self._end_after_failure()
            if self._kill_at is not None and time.monotonic() > self._kill_at + _KILL_SECONDS:
                logger.error("some ranks do not die even by SIGKILL: they are stuck in the kernel")
                break
            time.sleep(_POLL_SECONDS)
        return judge(self._ends())

    def _ends(self) -> list[RankEnd]:
        return [end for end in (rank.poll() for rank in self._ranks) if end is not None]

    def _pass_signals_on(self) -> None:
        while self._signals:
            number = self._signals.popleft()
            if number in URGENT and self._asked_to_stop:
                logger.warning("%s came a second time: killing all ranks", number.name)
                self._kill_at = time.monotonic()
            else:
                logger.info("passing %s on to the ranks", number.name)
                self._asked_to_stop |= number in URGENT
                for rank in self._ranks:
                    rank.forward(number)

    def _end_after_failure(self) -> None:
        first = next((end for end in self._ends() if end.code not in (0, EXIT_PREEMPTED)), None)
        if first and self._kill_at is None:
            self._kill_at = time.monotonic() + GRACE_SECONDS
            logger.warning("rank %d (pid %d) ended, stopping the others", first.rank, first.pid)
            for rank in self._ranks:
                rank.stop()
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            for rank in self._ranks:
                rank.kill()


def announce(verdict: Verdict) -> None:
    """Print why a run failed."""
    if verdict.report:
        print(verdict.report, file=sys.stderr, flush=True)
