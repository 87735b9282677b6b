"""One rank as its supervisor sees it: a process with a session of its own, so that its workers can be ended with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from veomni.errors import EXIT_PREEMPTED
from veomni.launch import failure
from veomni.launch.verdict import RankEnd


class RankProcess:
    """A rank, from its start to its end.

    Args:
        rank: Its number.
        command: What to execute.
        env: Its whole environment.
        failures: Directory in which it leaves its failure.
    """

    def __init__(self, rank: int, command: list[str], env: Mapping[str, str], failures: Path) -> None:
        self.rank = rank
        self._failures = failures
        self._stopped = False
        self._end: RankEnd | None = None
        # Standard input stays with the supervisor: several ranks reading one terminal would steal each other's lines.
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603
        self.pid = self._process.pid

    def poll(self) -> RankEnd | None:
        """Return how the rank ended; None while it runs."""
        if self._end is not None:
            return self._end
        state = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if state is None:
            return None
        if not (state.si_code == os.CLD_EXITED and state.si_status in (0, EXIT_PREEMPTED)):
            # Before the rank is reaped, so that no other process can have its number yet.
            self._signal_group(signal.SIGKILL)
        seen = time.time()
        status = self._process.wait()
        self._end = RankEnd(self.rank, self.pid, status, self._stopped, seen, failure.found(self._failures, self.rank))
        return self._end

    def forward(self, number: signal.Signals) -> None:
        """Send a signal to the rank alone: its data workers must live on until it has saved."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def stop(self) -> None:
        """Ask the rank to end, because another one has failed."""
        if self.poll() is None:
            self._stopped = True
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the rank and everything it has started, now."""
        if self.poll() is None:
            self._stopped = True
            self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)
