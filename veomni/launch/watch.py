"""Watch ranks that torchrun started in this process: how each ended, and an end for those that outlive a failed one.

torchrun reaps its children itself and, after a failure, waits 30 s before it kills those that ignore SIGTERM, as a rank
does that sits in a collective. So a thread per rank waits for its end without reaping it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from veomni.errors import EXIT_PREEMPTED
from veomni.launch import failure
from veomni.launch.supervisor import GRACE_SECONDS
from veomni.launch.verdict import RankEnd

_DISCOVERY_SECONDS = 0.02


class RankWatch:
    """Start to look for the process numbers of ``ranks`` ranks in ``directory``, where ``exec_rank.py`` leaves them."""

    def __init__(self, directory: Path, ranks: int) -> None:
        self._directory = directory
        self._ranks = ranks
        self._lock = threading.RLock()  # a signal may interrupt the handler of another one
        self._running: set[int] = set()
        self._ends: list[RankEnd] = []
        self._waiters: list[threading.Thread] = []
        threading.Thread(target=self._discover, daemon=True).start()

    def signal(self, number: signal.Signals) -> int:
        """Send a signal to all ranks that run, SIGKILL to their workers too; return how many there were."""
        with self._lock:
            for pid in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, number) if number == signal.SIGKILL else os.kill(pid, number)
            return len(self._running)

    def ends(self) -> list[RankEnd]:
        """Return how the ranks ended, after all of them have."""
        for waiter in self._waiters:
            waiter.join()
        return list(self._ends)

    def _discover(self) -> None:
        known: set[Path] = set()
        while len(known) < self._ranks:
            for path in set(self._directory.glob("*.pid")) - known:
                known.add(path)
                rank, pid = (int(word) for word in path.read_text().split())
                waiter = threading.Thread(
                    target=self._wait, args=(rank, pid, int(path.stem.removeprefix("rank"))), daemon=True
                )
                with self._lock:
                    self._running.add(pid)
                    self._waiters.append(waiter)
                waiter.start()
            time.sleep(_DISCOVERY_SECONDS)

    def _wait(self, rank: int, pid: int, local_rank: int) -> None:
        status = 0
        with contextlib.suppress(ChildProcessError):  # reaped in the same instant: torchrun reports it then
            state = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            status = (state.si_status if state.si_code == os.CLD_EXITED else -state.si_status) if state else 0
        with self._lock:
            self._running.discard(pid)
            failed_before = any(end.code not in (0, EXIT_PREEMPTED) for end in self._ends)
            end = RankEnd(rank, pid, status, failed_before, time.time(), failure.found(self._directory, local_rank))
            self._ends.append(end)
        if end.code not in (0, EXIT_PREEMPTED) and not failed_before:
            killer = threading.Timer(GRACE_SECONDS, self.signal, (signal.SIGKILL,))
            killer.daemon = True
            killer.start()
