"""One of two ranks dies at a durable operation of a save: what is found afterwards is one whole checkpoint."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.faults.two_ranks import (
    before_each_operation,
    copy_of,
    load_and_compare,
    names,
    save_steps,
    state_at,
    whole_step,
)
from veomni.checkpoint import Checkpointer
from veomni.testing.ranks import RankFailed, run_ranks


def save_third(directory: Path, async_save: bool, victim: int, fatal: int | None) -> list[str]:
    """Save step 3; ``victim`` dies before its operation number ``fatal``. Returns its operations."""
    checkpointer = Checkpointer(directory, async_save=async_save)
    state, operations = state_at(3), []

    def note(operation):
        if len(operations) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        operations.append(operation)

    dist.barrier()
    if dist.get_rank() == victim:
        before_each_operation(note)
    checkpointer.save(state, 3)
    checkpointer.close()
    return list(operations)


@pytest.mark.parametrize(("async_save", "first", "stride"), [(False, 0, 2), (True, 1, 4)])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_at_any_operation_tears_nothing(two_saved, tmp_path, victim, async_save, first, stride):
    unbroken = copy_of(two_saved, tmp_path / "unbroken")
    operations = run_ranks(save_third, 2, unbroken, async_save, victim, None)[victim]
    assert names(unbroken) == ["global_step_2", "global_step_3"]
    found, sample = [], range(first, len(operations), stride)
    for fatal in sample:
        directory = copy_of(two_saved, tmp_path / str(fatal))
        with pytest.raises(RankFailed, match=f"rank {victim} --- ended with status {signal.SIGKILL:d}"):
            run_ranks(save_third, 2, directory, async_save, victim, fatal)
        found.append(whole_step(directory))
        assert "global_step_2" in names(directory)
    # The last fsync of rank 0 makes the published name durable; nothing of rank 1 comes after the publication.
    published = len(operations) - 1 - operations[::-1].index("fsync") if victim == 0 else len(operations)
    assert found == [3 if fatal >= published else 2 for fatal in sample]


@pytest.mark.parametrize("async_save", [False, True])
def test_after_a_kill_the_same_ranks_go_on(two_saved, tmp_path, async_save):
    directory = copy_of(two_saved, tmp_path / "run")
    with pytest.raises(RankFailed):
        run_ranks(save_third, 2, directory, async_save, 1, 1)
    assert run_ranks(load_and_compare, 2, directory) == [2, 2]
    run_ranks(save_steps, 2, directory, (3, 4), async_save)
    assert run_ranks(load_and_compare, 2, directory) == [4, 4]
    assert names(directory) == ["global_step_3", "global_step_4"]
