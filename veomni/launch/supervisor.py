"""Start the ranks of this node and watch them: pass signals on, and when one dies end the others."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from veomni.errors import EXIT_PREEMPTED, LaunchError
from veomni.launch.environment import SUPERVISOR_VARIABLE, Environment
from veomni.launch.rank_end import DIRECTORY_VARIABLE, RankEnd, found_failure, judge
from veomni.launch.signals import URGENT, handled
from veomni.logging import create_logger

_EXEC_RANK = str(Path(__file__).with_name("exec_rank.py"))
_FORWARDED = (*URGENT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_GRACE_SECONDS = 5.0
_KILL_SECONDS = 4.0  # grace and this together stay below the ten seconds in which all ranks must be gone
_POLL_SECONDS = 0.02

logger = create_logger(__name__)


def supervise(first: Environment, command: list[str]) -> int:
    """Run ``command`` for every rank of this node, from ``first`` on; print why it failed, and return the exit code."""
    arrived: deque[int] = deque()
    with contextlib.ExitStack() as stack:
        stack.enter_context(handled(_FORWARDED, lambda number, frame: arrived.append(number)))
        scratch = tempfile.TemporaryDirectory(prefix="veomni-ranks-", ignore_cleanup_errors=True)
        failures = Path(stack.enter_context(scratch))
        first = replace(first, kind="child", master_port=first.master_port or stack.enter_context(_held_port()))
        logger.info("starting %d ranks on this node", first.local_world_size)
        ranks: list[_RankProcess] = []
        try:
            for number in range(first.local_world_size):
                place = replace(first, rank=first.rank + number, local_rank=number)
                ranks.append(_RankProcess(place, command, failures))
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


class _RankProcess:
    """A rank, from its start to its end; it is killed when this process dies, and its failure is in ``failures``."""

    def __init__(self, place: Environment, command: list[str], failures: Path) -> None:
        self._place, self._failures = place, failures
        self._stopped = False
        self._end: RankEnd | None = None
        threads = max(1, len(os.sched_getaffinity(0)) // place.local_world_size)
        own = {DIRECTORY_VARIABLE: str(failures), SUPERVISOR_VARIABLE: str(os.getpid())}
        self._process = subprocess.Popen(  # noqa: S603 - as a file, without site-packages, it costs about 15 ms
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


class _Supervisor:
    def __init__(self, ranks: Sequence[_RankProcess], arrived: deque[int]) -> None:
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
    """Reserve a port for rank 0's store: Linux lets it listen there meanwhile, and gives no other process that port."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield int(holder.getsockname()[1])
