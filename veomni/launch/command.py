"""The command line that starts this program again, as another rank."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from veomni.errors import LaunchError

_EXEC_RANK = str(Path(__file__).with_name("exec_rank.py"))


def own_command() -> list[str]:
    """Return this program's command line: interpreter, its flags, script or ``-m`` or ``-c``, and arguments.

    Raises:
        LaunchError: its command cannot be repeated (standard input, a prompt, a notebook, a multiprocessing worker).
    """
    program = getattr(sys.modules["__main__"], "__file__", None)
    multiprocessing = sys.modules.get("multiprocessing.process")
    if multiprocessing is not None and multiprocessing.parent_process() is not None:
        reason = "a multiprocessing worker"
    elif "ipykernel" in sys.modules or hasattr(sys, "ps1"):
        reason = "an interactive session"
    elif program == "<stdin>" or (program is None and sys.argv[0] != "-c"):
        reason = "a program read from standard input"
    else:
        return [sys.executable, *sys.orig_argv[1:]]
    raise LaunchError(
        f"several processes cannot be started from {reason}",
        "put the program in a file and start that, or use one device",
    )


def tied_to_this_process(command: list[str]) -> list[str]:
    """Return ``command`` so wrapped that on Linux it is killed when this process dies, and that it writes its pid."""
    return [sys.executable, "-I", "-S", _EXEC_RANK, str(os.getpid()), *command]


def threads_per_rank(ranks: int) -> int:
    """Return how many threads each of ``ranks`` processes on this node can have to itself, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)
