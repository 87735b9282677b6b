"""A request to stop, taken as a flag that a training loop reads at its step boundaries."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_URGENT = (signal.SIGTERM, signal.SIGINT)
_ECHO_SECONDS = 0.5


class StopSignal:
    """Handlers of SIGTERM, SIGINT and SIGUSR1 that set a flag and nothing else.

    A second SIGTERM or SIGINT takes its default effect at once. One that follows within half a second is taken for
    the echo of the first: Slurm signals every process of a job, and torchrun or the supervisor pass the same signal on.
    Signals that were ignored when the process started (``nohup``, a background job) stay ignored.

    Attributes:
        requested: Whether one of the signals came.
        signal_name: The first one's name, such as "SIGTERM".

    Raises:
        ValueError: made outside the main thread, where Python allows no handlers.
    """

    def __init__(self) -> None:
        self.requested = False
        self.signal_name: str | None = None
        self._since = 0.0
        self._process = os.getpid()
        kept = {number: signal.getsignal(number) for number in _WATCHED}
        self._previous = {number: handler for number, handler in kept.items() if handler is not signal.SIG_IGN}
        for number in self._previous:
            signal.signal(number, self._handle)

    def close(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked data worker must still end on a signal
            self._take_default(number)
        elif not self.requested:
            self.requested, self.signal_name, self._since = True, signal.Signals(number).name, time.monotonic()
        elif number in _URGENT and time.monotonic() - self._since > _ECHO_SECONDS:
            self._take_default(number)

    def _take_default(self, number: int) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
