"""The example script on all GPUs: a signal saves and ends it with 75, a killed or hung rank ends it with 70."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.examples.conftest import corpus
from tests.examples.script import ROOT, SHORT, agree, arguments, rows
from tests.gpu.devices import KIND, RANKS, two_devices
from tests.launch.conftest import Program, clean_environment, is_running, wait_until

__all__ = ["corpus"]

STEPS = 120
FOREVER = 1_000_000
TIMEOUT = 15
"""Seconds that a collective waits."""


class Run:
    """The script, in a folder of its own."""

    def __init__(self, folder: Path, corpus: Path, steps: int) -> None:
        self.folder = folder
        options = {
            **SHORT, "model.config_path": ROOT / "configs/model_configs/tiny_qwen3.json", "train.accelerator": KIND,
            "train.data_parallel_mode": "fsdp2", "train.devices": RANKS[-1], "train.max_steps": steps,
            "train.checkpoint.save_final": "true",
        }  # fmt: skip
        script = [sys.executable, str(ROOT / "examples/train.py"), str(ROOT / "configs/text/tiny.yaml")]
        folder.mkdir(exist_ok=True)
        command = [*script, *arguments(corpus, folder / "out", options)]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.program = Program(folder, command, clean_environment(NCCL_TIMEOUT=str(TIMEOUT), PYTHONPATH=paths))

    def rows(self) -> list[dict[str, float]]:
        return rows(self.folder / "out") if (self.folder / "out/metrics.jsonl").exists() else []

    def ranks(self, after: int) -> list[int]:
        """The processes of its ranks, once so many steps are reported."""
        wait_until(lambda: len(self.rows()) >= after or self.program.process.poll() is not None, 240)
        return children(self.program.process.pid)


def children(pid: int) -> list[int]:
    """The processes that ``pid`` started, in the order of their numbers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, fields = stat.read_text().rpartition(")")
            found += [int(name.split()[0])] * (int(fields.split()[1]) == pid)
    return sorted(found)


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """All runs, started at once: most of a run is its start."""
    folder = tmp_path_factory.mktemp("runs")
    steps = {"unbroken": STEPS, "stopped": STEPS, "killed": FOREVER, "hung": FOREVER}
    found = {name: Run(folder / name, corpus, count) for name, count in steps.items()}
    found["stopped"].ranks(after=3)
    found["stopped"].program.send(signal.SIGTERM)
    yield found
    for run in found.values():
        run.program.send(signal.SIGKILL)  # its ranks die with it


def test_a_killed_rank_ends_the_run(runs):
    ranks, started = runs["killed"].ranks(after=3), time.monotonic()
    os.kill(ranks[-1], signal.SIGKILL)
    assert runs["killed"].program.wait(60) == 70, runs["killed"].program.output
    assert time.monotonic() - started < 15
    assert "was killed by SIGKILL" in runs["killed"].program.output
    assert not any(is_running(pid) for pid in ranks)


@two_devices
def test_a_hung_collective_ends_the_run(runs):
    ranks, started = runs["hung"].ranks(after=3), time.monotonic()
    os.kill(ranks[-1], signal.SIGSTOP)
    assert runs["hung"].program.wait(180) == 70, runs["hung"].program.output
    assert TIMEOUT - 1 < time.monotonic() - started < TIMEOUT + 120
    assert not any(is_running(pid) for pid in ranks)


def test_a_signal_saves_and_the_next_start_goes_on(runs, corpus):
    stopped = runs["stopped"]
    assert stopped.program.wait(240) == 75, stopped.program.output
    before = stopped.rows()
    assert 3 <= len(before) < STEPS
    assert (stopped.folder / f"out/checkpoints/global_step_{len(before)}").is_dir()
    resumed = Run(stopped.folder, corpus, STEPS)
    for run in (resumed, runs["unbroken"]):
        assert run.program.wait(240) == 0, run.program.output
    assert resumed.rows()[: len(before)] == before
    agree(resumed.rows(), runs["unbroken"].rows(), 1e-6)
