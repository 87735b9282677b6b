"""Ranks in forked processes: results by rank, failures by rank, and cases that follow each other."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest
import torch
import torch.distributed as dist

from tests.launch.conftest import wait_until
from veomni.testing.ranks import RankFailed, run_cases, run_ranks


def summed(value=1):
    total = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def raises_on(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} of {dist.get_world_size()}")
    dist.barrier()  # the others wait for it


def killed_on(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_results_come_by_rank():
    assert run_ranks(summed, 2, value=5) == [(0, 15), (1, 15)]


def test_a_failure_names_its_rank_and_holds_its_exception():
    with pytest.raises(RankFailed, match="ValueError: rank 1 of 2") as failed:
        run_ranks(raises_on, 2, 1)
    assert isinstance(failed.value.exceptions[1], ValueError)


def test_a_killed_rank_fails_too():
    with pytest.raises(RankFailed, match="rank 0 --- ended with status 9"):
        run_ranks(killed_on, 2, 0)


def test_a_hung_rank_is_killed():
    with pytest.raises(RankFailed, match="rank 0 --- ended with status 9"):
        run_ranks(lambda: dist.get_rank() or signal.pause(), 2, timeout=2)


def test_cases_share_ranks_until_one_fails():
    first, broken, third, fourth = run_cases(
        [os.getpid, lambda: raises_on(0), os.getpid, lambda: (os.getpid(), summed()[1])], 2
    )
    assert isinstance(broken, RankFailed)
    assert "ValueError: rank 0" in str(broken)
    assert [pid for pid, total in fourth if total == 3] == third
    assert not set(first) & set(third)


def meet(folder, own, other):
    (folder / own).touch()
    wait_until((folder / other).exists)
    return own


def test_forks_run_side_by_side(tmp_path):
    cases = [partial(meet, tmp_path, "one", "other"), lambda: raises_on(0), partial(meet, tmp_path, "other", "one")]
    first, broken, third = run_cases(cases, 1, at_once=3)
    assert isinstance(broken, RankFailed)
    assert (first, third) == (["one"], ["other"])
