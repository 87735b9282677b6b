"""Run a function on several gloo ranks, forked from the warm test process (about a second a case).

Every rank leaves by ``os._exit`` after a barrier and ``destroy_process_group``: gloo aborts at exit otherwise.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class RankFailed(AssertionError):
    """A rank raised or died; the message holds its traceback, ``exceptions`` what was raised, by rank."""

    def __init__(self, message: str, exceptions: dict[int, BaseException]) -> None:
        super().__init__(message)
        self.exceptions = exceptions


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, init: bool = True, timeout: float = 90.0, **kwargs: Any
) -> list[Any]:
    """Return ``[function(*args, **kwargs) on rank 0, ... on rank world_size - 1]``; ``init`` makes the gloo group.

    Results travel by pickle through a private directory. Inside, ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and
    ``MASTER_*`` are set, as torchrun sets them, so a ``Launcher`` joins by itself (use ``init=False`` then).
    """
    with tempfile.TemporaryDirectory() as scratch:
        port = free_port()
        sys.stdout.flush()
        sys.stderr.flush()
        pids = [
            _fork(function, rank, world_size, port, Path(scratch), init, timeout, args, kwargs)
            for rank in range(world_size)
        ]
        statuses = _wait(pids, timeout)
        return _collect(statuses, Path(scratch))


def _fork(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    scratch: Path,
    init: bool,
    timeout: float,
    args: Any,
    kwargs: Any,
) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    code = 1
    try:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
        result = _run(function, init, timeout, args, kwargs)
        (scratch / f"{rank}.result").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException as error:
        text = traceback.format_exc()
        try:
            payload = pickle.dumps((text, error))
            pickle.loads(payload)
        except Exception:
            payload = pickle.dumps((text, RuntimeError(repr(error))))
        (scratch / f"{rank}.error").write_bytes(payload)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(function: Callable[..., Any], init: bool, timeout: float, args: Any, kwargs: Any) -> Any:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if init:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    result = function(*args, **kwargs)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return result


def _wait(pids: list[int], timeout: float) -> list[int | None]:
    deadline = time.monotonic() + timeout
    statuses: list[int | None] = [None] * len(pids)
    grace: float | None = None
    while any(status is None for status in statuses):
        for rank, pid in enumerate(pids):
            if statuses[rank] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[rank] = status
        failed = any(status not in (None, 0) for status in statuses)
        if failed and grace is None:
            grace = time.monotonic() + 3.0  # the peers of a dead rank get a moment to write their own error
        if time.monotonic() > min(deadline, grace or deadline):
            for rank, pid in enumerate(pids):
                if statuses[rank] is None:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    statuses[rank] = -signal.SIGKILL
        time.sleep(0.005)
    return statuses


def _collect(statuses: list[int | None], scratch: Path) -> list[Any]:
    texts, exceptions = [], {}
    for rank, status in enumerate(statuses):
        error = scratch / f"{rank}.error"
        if error.exists():
            text, exceptions[rank] = pickle.loads(error.read_bytes())
            texts.append(f"--- rank {rank} ---\n{text}")
        elif status != 0:
            texts.append(f"--- rank {rank} --- ended with status {status}")
    if texts:
        raise RankFailed("\n".join(texts), exceptions)
    return [pickle.loads((scratch / f"{rank}.result").read_bytes()) for rank in range(len(statuses))]
