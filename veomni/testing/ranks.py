"""Run functions on several gloo ranks, forked from the warm test process: a second for the first, less for more."""

import gc
import importlib
import math
import os
import pickle
import secrets
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

_TOGETHER = 10  # cases of one fork: every case leaves groups behind, and each has threads and sockets
_GRACE = 3.0  # seconds that the peers of a dead rank have to write their own error


class RankFailed(AssertionError):  # noqa: N818  (a test fails by it)
    """A rank raised or died; ``exceptions`` are what was raised, by rank, and the message holds the tracebacks."""

    def __init__(self, message: str, exceptions: dict[int, BaseException]) -> None:
        super().__init__(message)
        self.exceptions = exceptions


def free_port() -> int:
    """Return a TCP port of this host that is free, and that no outgoing connection is given meanwhile."""
    while True:
        with socket.socket() as sock, suppress(OSError):
            port = 10000 + secrets.randbelow(20000)  # below the kernel's range for outgoing connections
            sock.bind(("127.0.0.1", port))
            return port


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, init: bool = True, timeout: float = 90.0, **kwargs: Any
) -> list[Any]:
    """Return ``[function(*args, **kwargs) on rank 0, ... on the last]``, or raise RankFailed; see :func:`run_cases`."""
    (found,) = run_cases([partial(function, *args, **kwargs)], world_size, init=init, timeout=timeout)
    if isinstance(found, RankFailed):
        raise found
    return found


def run_cases(
    cases: Sequence[Callable[[], Any]], world_size: int, *, init: bool = True, timeout: float = 90.0, at_once: int = 1
) -> list[list[Any] | RankFailed]:
    """Run cases one after the other on the same forked ranks; return what every rank returned, or how a case failed.

    A case that fails, or takes longer than ``timeout`` seconds, ends its ranks, and those behind it run on new ones.
    Cases are anything that a fork inherits, closures too; results travel by pickle. ``RANK``, ``WORLD_SIZE``,
    ``LOCAL_RANK`` and ``MASTER_*`` are set, as torchrun sets them, so that a ``Launcher`` joins; for those that launch
    one, ``init`` is False, and no gloo group is made first. ``at_once`` forks run side by side and share the cases; on
    GPUs too, as long as this process has not initialised CUDA, which no fork of it could do again.
    """
    length = max(1, min(_TOGETHER, math.ceil(len(cases) / at_once)))
    waiting = [range(len(cases))[start : start + length] for start in range(0, len(cases), length)]
    running: list[tuple[range, _Fork]] = []
    found: dict[int, list[Any] | RankFailed] = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    part = waiting.pop(0)
                    folder = Path(tempfile.mkdtemp(dir=scratch))
                    running.append((part, _Fork([cases[at] for at in part], world_size, folder, init, timeout)))
                for part, fork in [each for each in running if each[1].ended()]:
                    running.remove((part, fork))
                    outcomes = fork.outcomes()
                    found.update(zip(part, outcomes, strict=False))
                    waiting[:0] = [part[len(outcomes) :]] * (len(outcomes) < len(part))
                time.sleep(0.005)
        finally:
            for _, fork in running:
                fork.kill()
    return [found[at] for at in range(len(cases))]


class _Fork:
    """One fork of all ranks: it runs cases until one fails."""

    def __init__(
        self, cases: Sequence[Callable[[], Any]], world_size: int, scratch: Path, init: bool, timeout: float
    ) -> None:
        self.cases, self.world_size, self.scratch, self.init, self.timeout = cases, world_size, scratch, init, timeout
        self.port = free_port()
        self.statuses: dict[int, int] = {}
        self.deadline, self.finished, self.failed = time.monotonic() + timeout, 0, False
        sys.stdout.flush()
        sys.stderr.flush()
        self.pids = [self._start(rank) for rank in range(world_size)]

    def ended(self) -> bool:
        """Return whether all ranks have; those that outlive a case's timeout, or a dead peer, are killed."""
        for rank in self.running():
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                self.statuses[rank] = status
        if not self.failed and any(self.statuses.values()):
            self.failed, self.deadline = True, min(self.deadline, time.monotonic() + _GRACE)
        if time.monotonic() > self.deadline:
            if not self.failed and (now := len(os.listdir(self.scratch))) > self.finished:
                self.deadline, self.finished = time.monotonic() + self.timeout, now
            else:
                self.kill()
        return len(self.statuses) == len(self.pids)

    def running(self) -> list[int]:
        """Return the ranks that have not ended."""
        return [rank for rank in range(self.world_size) if rank not in self.statuses]

    def kill(self) -> None:
        """Send SIGKILL to every rank that runs."""
        for rank in self.running():
            os.kill(self.pids[rank], signal.SIGKILL)

    def outcomes(self) -> list[list[Any] | RankFailed]:
        """Return what every rank returned of each case, up to the first that failed."""
        self._import_what_ranks_did()
        found: list[list[Any] | RankFailed] = []
        for number in range(len(self.cases)):
            results = [self._file(number, rank) for rank in range(self.world_size)]
            if not all(path.exists() for path in results):
                return [*found, self._failure(number)]
            found.append([pickle.loads(path.read_bytes()) for path in results])
        return found

    def _import_what_ranks_did(self) -> None:
        """Import what rank 0 has imported: the ranks of the next fork inherit it, where each would spend seconds.

        Not where there are accelerators: an import may initialise one, and no fork can use it then.
        """
        import torch

        imported = self.scratch / "imported"
        used = imported.exists() and not torch.accelerator.is_available()
        for name in imported.read_text().split() if used else ():
            if name.partition(".")[0] in ("torch", "transformers", "veomni"):
                with suppress(ImportError):  # a module that a case has made up
                    importlib.import_module(name)

    def _file(self, number: int, rank: int, kind: str = "result") -> Path:
        return self.scratch / f"{number}.{rank}.{kind}"

    def _start(self, rank: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        os.setpgid(0, 0)
        gc.freeze()  # what a rank inherits is not searched for garbage, so its pages stay shared
        code = 1
        try:
            code = 0 if self._run_cases(rank) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # after a barrier and destroy_process_group: gloo aborts at exit otherwise

    def _run_cases(self, rank: int) -> bool:
        import torch

        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.world_size),
            LOCAL_WORLD_SIZE=str(self.world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.port),
            GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
        inherited = set(sys.modules)
        for number, case in enumerate(self.cases):
            if number:
                gc.collect()  # groups and their threads end with the last object that holds them
            try:
                _write(self._file(number, rank), pickle.dumps(self._result(case)))
            except BaseException as error:
                _write(self._file(number, rank, "error"), _pickled(error))
                return False
        if rank == 0:
            _write(self.scratch / "imported", "\n".join(sys.modules.keys() - inherited).encode())
        return True

    def _result(self, case: Callable[[], Any]) -> Any:
        import torch.distributed as dist

        from veomni.compat import gloo

        if self.init and not dist.is_initialized():
            gloo.share_loop()
            dist.init_process_group("gloo", timeout=timedelta(seconds=self.timeout))
        result = case()
        if dist.is_initialized():
            dist.barrier()
            if case is self.cases[-1]:
                dist.destroy_process_group()
        return result

    def _failure(self, number: int) -> RankFailed:
        texts, exceptions = [], {}
        for rank, status in sorted(self.statuses.items()):
            error = self._file(number, rank, "error")
            if error.exists():
                text, exceptions[rank] = pickle.loads(error.read_bytes())
                texts.append(f"--- rank {rank} ---\n{text}")
            elif status != 0:
                texts.append(f"--- rank {rank} --- ended with status {status}")
        return RankFailed("\n".join(texts), exceptions)


def _write(path: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.rename(path)


def _pickled(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        payload = pickle.dumps((text, error))
        pickle.loads(payload)
    except Exception:
        return pickle.dumps((text, RuntimeError(repr(error))))
    return payload
