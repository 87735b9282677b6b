"""``NCCL_TIMEOUT``: every group of the mesh waits so long and no longer; what is no number of seconds is refused."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.launch.conftest import wait_until
from veomni.errors import LaunchError
from veomni.launch import collective_timeout
from veomni.launcher import Launcher
from veomni.parallel.mesh import AXES, VIEWS
from veomni.strategies import DDP, FSDP2
from veomni.testing.ranks import RankFailed, run_ranks


def timeouts() -> set[timedelta]:
    launcher = Launcher(FSDP2(replicate=2), accelerator="cpu", timeout_seconds=77)
    launcher.launch()
    groups = [launcher.state.group(name) for name in (*AXES, *VIEWS)]
    groups += [dist.group.WORLD, *launcher.state.parameter_mesh.get_all_groups()]
    found = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    launcher.close()
    return found


@pytest.mark.parametrize(("value", "seconds"), [("123", 123), ("", 77)])
def test_every_group_has_it(monkeypatch: pytest.MonkeyPatch, value: str, seconds: int) -> None:
    monkeypatch.setenv("NCCL_TIMEOUT", value)
    assert run_ranks(timeouts, 4, init=False) == [{timedelta(seconds=seconds)}] * 4


def wait_for_an_absent_rank(done: Path) -> float | None:
    launcher = Launcher(DDP(), accelerator="cpu")
    launcher.launch()
    waited = None
    if launcher.rank == 0:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout"):
            dist.all_reduce(torch.ones(1), group=launcher.state.group("data"))
        waited = time.monotonic() - start
        done.touch()
    else:
        wait_until(done.exists)
    launcher.close()
    dist.destroy_process_group()
    return waited


def test_a_collective_ends_after_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NCCL_TIMEOUT", "2")
    waited, _ = run_ranks(wait_for_an_absent_rank, 2, tmp_path / "done", init=False)
    assert 1.9 < waited < 20


def launch() -> None:
    Launcher(DDP(), accelerator="cpu").launch()


@pytest.mark.parametrize("value", ["0", "-5", "ten", "1.5", "1e3", "99999999999999999999"])
def test_other_values_are_rejected(value: str) -> None:
    with pytest.raises(LaunchError, match="NCCL_TIMEOUT") as caught:
        collective_timeout({"NCCL_TIMEOUT": value})
    assert value in caught.value.problem
    assert caught.value.exit_code == 78


def test_the_launcher_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_TIMEOUT", "ten")
    with pytest.raises(RankFailed) as caught:
        run_ranks(launch, 1, init=False)
    assert isinstance(caught.value.exceptions[0], LaunchError)
