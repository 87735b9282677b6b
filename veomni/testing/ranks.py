"""Run functions on several gloo ranks, forked from the warm test process: a second for the first, less for more."""

import gc
import importlib
import os
import pickle
import secrets
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
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
    cases: Sequence[Callable[[], Any]], world_size: int, *, init: bool = True, timeout: float = 90.0
) -> list[list[Any] | RankFailed]:
    """Run cases one after the other on the same forked ranks; return what every rank returned, or how a case failed.

    A case that fails, or takes longer than ``timeout`` seconds, ends its ranks, and those behind it run on new ones.
    Cases are anything that a fork inherits, closures too; results travel by pickle. ``RANK``, ``WORLD_SIZE``,
    ``LOCAL_RANK`` and ``MASTER_*`` are set, as torchrun sets them, so that a ``Launcher`` joins; for those that launch
    one, ``init`` is False, and no gloo group is made first.
    """
    found: list[list[Any] | RankFailed] = []
    while len(found) < len(cases):
        together = cases[len(found) : len(found) + _TOGETHER]
        with tempfile.TemporaryDirectory() as scratch:
            found += _Fork(together, world_size, Path(scratch), init, timeout).run()
    return found


class _Fork:
    """One fork of all ranks: it runs cases until one fails."""

    def __init__(
        self, cases: Sequence[Callable[[], Any]], world_size: int, scratch: Path, init: bool, timeout: float
    ) -> None:
        self.cases, self.world_size, self.scratch, self.init, self.timeout = cases, world_size, scratch, init, timeout
        self.port = free_port()

    def run(self) -> list[list[Any] | RankFailed]:
        sys.stdout.flush()
        sys.stderr.flush()
        statuses = self._wait([self._start(rank) for rank in range(self.world_size)])
        self._import_what_ranks_did()
        found: list[list[Any] | RankFailed] = []
        for number in range(len(self.cases)):
            results = [self._file(number, rank) for rank in range(self.world_size)]
            if not all(path.exists() for path in results):
                return [*found, self._failure(number, statuses)]
            found.append([pickle.loads(path.read_bytes()) for path in results])
        return found

    def _import_what_ranks_did(self) -> None:
        """Import what rank 0 has imported: the ranks of the next fork inherit it, where each would spend seconds."""
        imported = self.scratch / "imported"
        for name in imported.read_text().split() if imported.exists() else ():
            with suppress(Exception):  # what a case has made up, or what only its working directory holds
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

        if self.init and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(seconds=self.timeout))
        result = case()
        if dist.is_initialized():
            dist.barrier()
            if case is self.cases[-1]:
                dist.destroy_process_group()
        return result

    def _wait(self, pids: Sequence[int]) -> dict[int, int]:
        """Return how every rank ended; those that outlive a case's timeout, or a dead peer, are killed."""
        statuses: dict[int, int] = {}
        deadline, finished, failed = time.monotonic() + self.timeout, 0, False
        while len(statuses) < len(pids):
            running = {rank: pid for rank, pid in enumerate(pids) if rank not in statuses}
            statuses |= {rank: ended[1] for rank, pid in running.items() if (ended := os.waitpid(pid, os.WNOHANG))[0]}
            if not failed and any(statuses.values()):
                failed, deadline = True, min(deadline, time.monotonic() + _GRACE)
            if time.monotonic() > deadline:
                if not failed and (now := len(os.listdir(self.scratch))) > finished:
                    deadline, finished = time.monotonic() + self.timeout, now
                    continue
                for rank in running.keys() - statuses.keys():
                    os.kill(running[rank], signal.SIGKILL)
            time.sleep(0.005)
        return statuses

    def _failure(self, number: int, statuses: Mapping[int, int]) -> RankFailed:
        texts, exceptions = [], {}
        for rank, status in sorted(statuses.items()):
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
