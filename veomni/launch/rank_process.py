"""One rank as its supervisor sees it: a process with a session of its own, so that its workers can be ended with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from veomni.errors import EXIT_PREEMPTED
from veomni.launch.environment import SUPERVISOR_VARIABLE, Environment
from veomni.launch.rank_end import DIRECTORY_VARIABLE, RankEnd, found_failure

_EXEC_RANK = str(Path(__file__).with_name("exec_rank.py"))


class RankProcess:
    """A rank at ``place``, from its start to its end; it is killed when this process dies.

    Its failure is left in the directory ``failures``.
    """

    def __init__(self, place: Environment, command: list[str], failures: Path) -> None:
        self._place, self._failures = place, failures
        self._stopped = False
        self._end: RankEnd | None = None
        threads = max(1, len(os.sched_getaffinity(0)) // place.local_world_size)
        own = {DIRECTORY_VARIABLE: str(failures), SUPERVISOR_VARIABLE: str(os.getpid())}
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", _EXEC_RANK, str(os.getpid()), *command],
            env={"OMP_NUM_THREADS": str(threads), **os.environ, **place.variables(), **own},
            stdin=subprocess.DEVNULL,  # several ranks reading one terminal would steal each other's lines
            start_new_session=True,
        )
        self._pid = self._process.pid

    def poll(self) -> RankEnd | None:
        """Return how the rank ended; None while it runs."""
        if self._end is not None:
            return self._end
        state = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if state is None:
            return None
        if not (state.si_code == os.CLD_EXITED and state.si_status in (0, EXIT_PREEMPTED)):
            # Before the rank is reaped, so that no other process can have its number yet.
            self._signal_group(signal.SIGKILL)
        seen, status = time.time(), self._process.wait()
        failure = found_failure(self._failures, self._place.local_rank)
        self._end = RankEnd(self._place.rank, self._pid, status, self._stopped, seen, failure)
        return self._end

    def forward(self, number: int) -> None:
        """Send a signal to the rank alone: its data workers must live on until it has saved."""
        if self.poll() is None:
            os.kill(self._pid, number)

    def stop(self, number: int) -> None:
        """End the rank, because another one has failed: SIGTERM goes to it alone, SIGKILL to all it has started too."""
        if self.poll() is None:
            self._stopped = True
            self._signal_group(number) if number == signal.SIGKILL else os.kill(self._pid, number)

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, number)
