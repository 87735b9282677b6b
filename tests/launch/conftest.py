"""Real programs in real processes: started from a file in ``tmp_path``, watched from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SETTERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "NNODES",
    "NPROC_PER_NODE",
)
HEADER = """
    import os, signal, sys, time
    from pathlib import Path
    from veomni.errors import ConfigError
    from veomni.launch import StopSignal, entrypoint, join_or_start

    def note(name, text):
        path = Path(os.environ["NOTES"]) / name
        path.with_suffix(".tmp").write_text(str(text))
        path.with_suffix(".tmp").replace(path)
"""


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what any launcher of ranks may have left in it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in SETTERS
        and not name.startswith(("SLURM_", "VEOMNI_", "MASTER_", "TORCHELASTIC_", "CUDA_VISIBLE"))
    }
    return {**kept, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **extra}


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> float:
    """Return how long it took until ``condition`` held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "waited in vain"
        time.sleep(0.005)
    return time.monotonic() - start


def is_running(pid: int) -> bool:
    """Whether a process executes; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Program:
    """A program under test, its output and the notes its ranks write."""

    def __init__(self, folder: Path, command: list[str], env: dict[str, str]) -> None:
        self.notes = folder / "notes"
        self.notes.mkdir(exist_ok=True)
        self._output = folder / "output"
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder,
                env={**env, "NOTES": str(self.notes)}, start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._output.read_text()

    def note(self, name: str) -> str:
        """Wait for a note and return it."""
        wait_until(lambda: (self.notes / name).exists() or self.process.poll() is not None)
        assert (self.notes / name).exists(), self.output
        return (self.notes / name).read_text()

    def pids(self, ranks: int) -> list[int]:
        """Wait until all ranks run, and return their process numbers."""
        return [int(self.note(f"pid{rank}")) for rank in range(ranks)]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 40.0) -> int:
        """Return the exit code."""
        return self.process.wait(seconds)

    def end_by_killing(self, rank: int, ranks: int = 2, *, within: float = 10.0) -> None:
        """Kill one of the ranks: the run names it, and all are gone within seconds."""
        pids = self.pids(ranks)
        os.kill(pids[rank], signal.SIGKILL)
        killed = time.monotonic()
        assert self.wait() == 70
        assert time.monotonic() - killed < within
        assert f"run failed: rank {rank} (pid {pids[rank]}) was killed by SIGKILL" in self.output
        assert not any(is_running(pid) for pid in pids)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Return a function that writes a program and starts it; what still runs at the end of the test is killed."""
    programs: list[Program] = []

    def begin(body: str, *arguments: str, command: list[str] | None = None, **env: str) -> Program:
        script = tmp_path / "program with space.py"
        script.write_text(textwrap.dedent(HEADER) + textwrap.dedent(body))
        programs.append(
            Program(tmp_path, [*(command or [sys.executable]), str(script), *arguments], clean_environment(**env))
        )
        return programs[-1]

    yield begin
    for program in programs:
        if program.process.poll() is None:
            program.process.kill()
            program.process.wait()
