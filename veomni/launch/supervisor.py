"""Start the ranks of this node and watch them: pass signals on, and when one dies end the others."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from veomni.errors import LaunchError
from veomni.launch.environment import Environment
from veomni.launch.rank_end import RankEnd, judge
from veomni.launch.rank_process import RankProcess
from veomni.launch.signals import URGENT, handled
from veomni.logging import create_logger

_FORWARDED = (*URGENT, signal.SIGUSR1, signal.SIGHUP)
_GRACE_SECONDS = 5.0
_KILL_SECONDS = 4.0  # grace and this together stay below the ten seconds in which all ranks must be gone
_POLL_SECONDS = 0.02

logger = create_logger(__name__)


def supervise(first: Environment, command: list[str]) -> int:
    """Run ``command`` once for every rank of this node, print why the run failed if it did, and return its exit code.

    ``first`` is the place of this node's first rank; its ``master_port`` of 0 takes a free one.
    """
    arrived: deque[int] = deque()
    with contextlib.ExitStack() as stack:
        stack.enter_context(handled(_FORWARDED, lambda number, frame: arrived.append(number)))
        scratch = tempfile.TemporaryDirectory(prefix="veomni-ranks-", ignore_cleanup_errors=True)
        failures = Path(stack.enter_context(scratch))
        first = replace(first, kind="child", master_port=first.master_port or stack.enter_context(_held_port()))
        logger.info("starting %d ranks on this node", first.local_world_size)
        ranks: list[RankProcess] = []
        try:
            for number in range(first.local_world_size):
                place = replace(first, rank=first.rank + number, local_rank=number)
                ranks.append(RankProcess(place, command, failures))
        except OSError as error:
            for started in ranks:
                started.stop(signal.SIGKILL)
            problem = f"rank {len(ranks)} of {first.local_world_size} cannot be started: {error}"
            raise LaunchError(problem, "free memory or processes") from error
        ends = _Supervisor(ranks, arrived).run()
    verdict = judge(ends)
    if verdict.report:
        print(verdict.report, file=sys.stderr, flush=True)
    return verdict.exit_code


class _Supervisor:
    """Waits for ``ranks``; signals to pass on arrive in ``arrived``."""

    def __init__(self, ranks: Sequence[RankProcess], arrived: deque[int]) -> None:
        self._ranks, self._arrived = ranks, arrived
        self._stop_requested = False
        self._kill_at: float | None = None

    def run(self) -> list[RankEnd]:
        """Return how the ranks ended, once every one is gone."""
        while len(ends := self._ends()) < len(self._ranks):
            self._pass_signals_on()
            self._end_after_failure(ends)
            if self._kill_at is not None and time.monotonic() > self._kill_at + _KILL_SECONDS:
                logger.error("some ranks do not die even by SIGKILL: they are stuck in the kernel")
                break
            time.sleep(_POLL_SECONDS)
        return self._ends()

    def _ends(self) -> list[RankEnd]:
        return [end for end in (rank.poll() for rank in self._ranks) if end is not None]

    def _pass_signals_on(self) -> None:
        while self._arrived:
            number = self._arrived.popleft()
            name = signal.Signals(number).name
            if number in URGENT and self._stop_requested:
                logger.warning("%s came a second time: killing all ranks", name)
                self._kill_at = time.monotonic()
            else:
                logger.info("passing %s on to the ranks", name)
                self._stop_requested |= number in URGENT
                for rank in self._ranks:
                    rank.forward(number)

    def _end_after_failure(self, ends: Sequence[RankEnd]) -> None:
        first = next((end for end in ends if end.failed), None)
        if first and self._kill_at is None:
            self._kill_at = time.monotonic() + _GRACE_SECONDS
            logger.warning("rank %d (pid %d) ended, stopping the others", first.rank, first.pid)
            for rank in self._ranks:
                rank.stop(signal.SIGTERM)
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            for rank in self._ranks:
                rank.stop(signal.SIGKILL)


@contextlib.contextmanager
def _held_port() -> Iterator[int]:
    """Reserve a port for rank 0's store.

    Linux lets rank 0 listen on it while this socket is bound, and gives it to no process that asks for any free port.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield int(holder.getsockname()[1])
