"""The disk is full, for one of two ranks: both are told the same, nothing is published, and a later save works."""

from __future__ import annotations

import errno
import io
import logging
import os
import resource
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

from tests.faults.two_ranks import (
    before_each_operation,
    copy_of,
    load_and_compare,
    names,
    state_at,
    whole_step,
)
from veomni.checkpoint import Checkpointer
from veomni.checkpoint.checkpointer import SaveFailedError
from veomni.testing.ranks import run_ranks

COLLECTIVE_TIMEOUT = 30.0


def failed_save(checkpointer: Checkpointer, step: int) -> str:
    def save() -> None:
        checkpointer.save(state_at(step), step)
        checkpointer.wait()

    started = time.monotonic()
    with pytest.raises(SaveFailedError) as caught:
        save()
    assert time.monotonic() - started < COLLECTIVE_TIMEOUT / 2
    dist.barrier()  # rank 0 removes what was written after it has told the other
    assert names(checkpointer.directory) == ["global_step_1", "global_step_2"]
    return str(caught.value)


def refuse_at(victim: int, refused: int) -> None:
    """The operation number ``refused`` of ``victim`` fails, from now on."""
    operations = []

    def refuse(operation):
        operations.append(operation)
        if len(operations) == refused + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if dist.get_rank() == victim:
        before_each_operation(refuse)


def save_on_a_full_disk(directory: Path, async_save: bool, victim: int, refused: int) -> str:
    """``victim``'s operation number ``refused`` fails. Returns what this rank was told."""
    checkpointer = Checkpointer(directory, async_save=async_save)
    refuse_at(victim, refused)
    said = failed_save(checkpointer, 3)
    checkpointer.save(state_at(4), 4)  # space was made
    checkpointer.close()
    return said


def save_and_fail_after_publication(directory: Path, refused: int) -> str:
    """Returns this rank's warnings."""
    checkpointer, warnings = Checkpointer(directory), io.StringIO()
    handler = logging.StreamHandler(warnings)
    handler.setLevel(logging.WARNING)
    logging.getLogger("veomni").addHandler(handler)
    refuse_at(0, refused)
    checkpointer.save(state_at(3), 3)
    checkpointer.close()
    return warnings.getvalue()


def save_with_a_limit(directory: Path) -> str:
    """The kernel lets rank 1 write 100 bytes a file."""
    checkpointer = Checkpointer(directory)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
    said = failed_save(checkpointer, 3)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    checkpointer.save(state_at(4), 4)
    checkpointer.close()
    return said


# Rank 0: weights, metadata, its rename, own state (2), shared state (2), manifest, directory, publishing rename.
@pytest.mark.parametrize(
    ("victim", "refused", "async_save"),
    [(0, 0, False), (0, 1, False), (0, 4, False), (0, 7, True), (0, 9, False), (1, 0, True), (1, 2, False)],
)
def test_both_ranks_are_told_and_the_next_save_works(two_saved, tmp_path, victim, refused, async_save):
    directory = copy_of(two_saved, tmp_path / "run")
    said = run_ranks(save_on_a_full_disk, 2, directory, async_save, victim, refused, timeout=COLLECTIVE_TIMEOUT)
    assert said[0] == said[1]
    assert "step 3 was not written" in said[0]
    assert os.strerror(errno.ENOSPC) in said[0]
    assert f"(rank {victim}: " in said[0]
    assert "Traceback" not in said[0]
    assert names(directory) == ["global_step_2", "global_step_4"]
    assert whole_step(directory) == 4


def test_a_limit_that_the_kernel_enforces(two_saved, tmp_path):
    directory = copy_of(two_saved, tmp_path / "run")
    said = run_ranks(save_with_a_limit, 2, directory, timeout=COLLECTIVE_TIMEOUT)
    assert said[0] == said[1]
    assert os.strerror(errno.EFBIG) in said[0]
    assert run_ranks(load_and_compare, 2, directory) == [4, 4]


@pytest.mark.parametrize("refused", [10, 11])  # the fsync after the publishing rename, and the rename of what goes
def test_a_failure_after_the_publication_is_no_failed_save(two_saved, tmp_path, refused):
    directory = copy_of(two_saved, tmp_path / "run")
    warned = run_ranks(save_and_fail_after_publication, 2, directory, refused, timeout=COLLECTIVE_TIMEOUT)
    assert names(directory) == ["global_step_1", "global_step_2", "global_step_3"]
    assert whole_step(directory) == 3
    assert "global_step_3 is saved, but" in warned[0]
    assert os.strerror(errno.ENOSPC) in warned[0]


def test_a_background_save_that_failed_does_not_keep_the_directory_locked(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpointer = Checkpointer(tmp_path, async_save=True)
    monkeypatch.setattr(os, "fsync", full)
    checkpointer.save({"model": nn.Linear(2, 2)}, 1)
    with pytest.raises(SaveFailedError, match="No space left"):
        checkpointer.close()
    assert names(tmp_path) == []
    Checkpointer(tmp_path).close()
