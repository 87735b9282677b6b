"""Signals: handlers that are put back, and requests that a training loop reads at its step boundaries."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

URGENT = (signal.SIGTERM, signal.SIGINT)
_ECHO_SECONDS = 0.5


@contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Handle signals inside the context; those ignored before (``nohup``, a background job) stay ignored."""
    previous = {number: signal.getsignal(number) for number in numbers}
    kept = {number: before for number, before in previous.items() if before is not signal.SIG_IGN}
    for number in kept:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in kept.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)


class StopSignal(ExitStack):
    """Handlers of SIGTERM, SIGINT and SIGUSR1, until :meth:`close`: the first signal sets ``requested`` and its name.

    A second SIGTERM or SIGINT takes its default effect at once. One that follows within half a second is taken for
    the echo of the first: Slurm signals every process of a job, and torchrun or the supervisor pass the same signal on.
    Python allows handlers in the main thread only: elsewhere this is a ValueError.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requested = False
        self.signal_name: str | None = None
        self._since = 0.0
        self._process = os.getpid()
        self.enter_context(handled((*URGENT, signal.SIGUSR1), self._handle))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked data worker must still end on a signal
            take_default(number)
        elif not self.requested:
            self.requested, self.signal_name, self._since = True, signal.Signals(number).name, time.monotonic()
        elif number in URGENT and time.monotonic() - self._since > _ECHO_SECONDS:
            take_default(number)


class ProfileSignal(ExitStack):
    """A handler of SIGUSR2, until :meth:`close`: it sets ``requested``, for the training loop to read and to clear."""

    def __init__(self) -> None:
        super().__init__()
        self.requested = False
        before = signal.signal(signal.SIGUSR2, self._handle)  # also where exec_rank.py has it ignored until now
        self.callback(signal.signal, signal.SIGUSR2, signal.SIG_DFL if before is None else before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def take_default(number: int) -> None:
    """End this process as one without a handler ends."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
