"""When a run saves, and what it continues from, as the directory shows it."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from veomni.errors import EXIT_PREEMPTED, CheckpointError
from veomni.launcher import Launcher
from veomni.loop.checkpoint_schedule import CheckpointSchedule
from veomni.strategies import FSDP2, Single
from veomni.testing.ranks import RankFailed, run_ranks


def on_disk(directory: Path) -> list[int]:
    """The published steps; a save in the background may be writing another."""
    matches = (re.fullmatch(r"global_step_(\d+)", path.name) for path in directory.glob("global_step_*"))
    return sorted(int(match[1]) for match in matches if match)


def run(launcher: Launcher, last_step: int, at_step=lambda index: None) -> int:
    """Take steps without a gradient from wherever the launcher resumes; returns the step it resumed from."""
    model = launcher.setup_model(nn.Linear(2, 2))
    state = {"model": model}
    resumed = launcher.resume(state)
    for batch in launcher.track(iter(lambda: [{"x": torch.zeros(1, 2)}], None), max_steps=last_step):
        at_step(batch.index)
        launcher.checkpoint(state)
    launcher.close()
    return resumed


def launched(schedule: CheckpointSchedule, strategy=None) -> Launcher:
    launcher = Launcher(strategy or Single(), accelerator="cpu", timeout_seconds=60, checkpoints=schedule)
    launcher.launch()
    return launcher


SCHEDULES = [  # save_steps, save_final, keep_last, last step; published, in order; left at the end
    (2, True, 3, 5, [2, 4, 5], [2, 4, 5]),
    (2, True, 2, 4, [2, 4], [2, 4]),
    (2, False, 2, 5, [2, 4], [2, 4]),
    (1, True, 2, 5, [1, 2, 3, 4, 5], [4, 5]),
    (None, True, 2, 3, [3], [3]),
    (None, False, 2, 3, [], []),
]


def published_by_schedules(directory: Path, async_save: bool) -> list[tuple[list[int], list[int], int]]:
    """For each schedule: the renames that published something, what is left, and the most there ever was."""
    renames: list[str] = []
    sys.addaudithook(lambda event, paths: renames.append(str(paths[1])) if event == "os.rename" else None)
    found = []
    for number, (save_steps, save_final, keep_last, last_step, *_) in enumerate(SCHEDULES):
        root, most = directory / str(number), []
        options = {"save_steps": save_steps, "save_final": save_final, "keep_last": keep_last}
        launcher = launched(CheckpointSchedule(root, async_save=async_save, **options))
        renames.clear()
        run(launcher, last_step, lambda index, root=root, most=most: most.append(len(on_disk(root))))
        assert len(list(root.glob("global_step_*"))) == len(on_disk(root))
        published = [int(match[1]) for path in renames if (match := re.search(r"global_step_(\d+)$", path))]
        found.append((published, on_disk(root), max(most)))
    return found


@pytest.mark.parametrize("async_save", [False, True])
def test_every_n_steps_and_once_at_the_end(tmp_path, async_save):
    found = run_ranks(published_by_schedules, 1, tmp_path, async_save, init=False)[0]
    for (_, _, keep_last, _, published, left), outcome in zip(SCHEDULES, found, strict=True):
        assert outcome[:2] == (published, left)
        assert outcome[2] <= keep_last + async_save  # the one in the background is published before the oldest goes


def stopped(directory: Path, save_steps: int | None) -> int:
    """Rank 1 is asked to stop in the middle of step 2."""
    schedule = CheckpointSchedule(directory, save_steps=save_steps, save_final=False)

    def ask(index: int) -> None:
        if index == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    return run(launched(schedule, FSDP2()), 10, ask)


def resumed(directory: Path, ranks_step: int) -> int:
    return run(launched(CheckpointSchedule(directory, save_final=False), FSDP2()), ranks_step)


@pytest.mark.parametrize("save_steps", [None, 3])
def test_a_signal_to_one_rank_saves_on_all_and_the_run_goes_on_from_there(tmp_path, save_steps):
    with pytest.raises(RankFailed) as caught:
        run_ranks(stopped, 2, tmp_path, save_steps, init=False)
    assert [caught.value.exceptions[rank].code for rank in (0, 1)] == [EXIT_PREEMPTED] * 2
    assert on_disk(tmp_path) == [3]  # the ranks agree at the next step's beginning, and that step is taken
    assert run_ranks(resumed, 2, tmp_path, 4, init=False) == [3, 3]


# ---------------------------------------------------------------- what a run continues from


def weighing(step: float) -> dict[str, nn.Module]:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, step)
    return {"model": model}


def save(directory: Path, *steps: int, **options) -> None:
    schedule = CheckpointSchedule(directory, save_steps=1, **options)
    for step in steps:
        schedule.save_if_due(weighing(step), step)
    schedule.close()


def resume(directory: Path, **options) -> tuple[int, float]:
    """The step that a run starts from, and what is in its model."""
    schedule, state = CheckpointSchedule(directory, **options), weighing(0)
    try:
        return schedule.resume(state), state["model"].weight[0, 0].item()
    finally:
        schedule.close()


def damage(checkpoint: Path) -> None:
    path = checkpoint / "weights" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_auto_takes_the_newest_and_starts_afresh_where_there_is_none(tmp_path):
    assert resume(tmp_path) == (0, 0.0)
    save(tmp_path, 9, 10)
    assert resume(tmp_path) == (10, 10.0)


def test_a_run_falls_back_from_a_damaged_one_and_comes_past_it(tmp_path, caplog, monkeypatch):
    save(tmp_path, 3, 6)
    damage(tmp_path / "global_step_6")
    monkeypatch.setattr(logging.getLogger("veomni"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert resume(tmp_path) == (3, 3.0)
    assert "global_step_6 is damaged" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 6)  # or the job would end here each time that it is started again
    assert "it is kept as" in caplog.text
    assert resume(tmp_path) == (6, 6.0)
    save(tmp_path, 7)
    aside = [path.name for path in tmp_path.glob("global_step_6.damaged-*")]
    assert len(aside) == 1  # nothing deletes it
    assert aside[0] in caplog.text


def test_a_path_is_taken_or_rejected_and_never_replaced_by_another(tmp_path):
    save(tmp_path / "old", 3, 6)
    assert resume(tmp_path / "new", resume=str(tmp_path / "old" / "global_step_3")) == (3, 3.0)
    damage(tmp_path / "old" / "global_step_6")
    with pytest.raises(CheckpointError, match=r"global_step_6: the contents of weights/__0_0\.distcp have changed"):
        resume(tmp_path / "new", resume=str(tmp_path / "old" / "global_step_6"))
    with pytest.raises(CheckpointError, match="global_step_9: there is no such directory"):
        resume(tmp_path / "new", resume=str(tmp_path / "old" / "global_step_9"))


def test_checkpoints_of_a_run_that_is_given_up_are_not_mixed_with_those_of_the_next(tmp_path):
    assert resume(tmp_path / "new", resume="none") == (0, 0.0)
    save(tmp_path, 3, 6)
    before = on_disk(tmp_path)
    for start in ("none", str(tmp_path / "global_step_3")):
        with pytest.raises(CheckpointError, match="global_step_6 is newer than step"):
            resume(tmp_path, resume=start)
    assert on_disk(tmp_path) == before
    assert resume(tmp_path, resume=str(tmp_path / "global_step_6")) == (6, 6.0)


def test_a_valid_one_is_never_written_over(tmp_path, caplog, monkeypatch):
    save(tmp_path, 3)
    manifest = (tmp_path / "global_step_3" / "manifest.json").read_bytes()
    monkeypatch.setattr(logging.getLogger("veomni"), "propagate", True)
    schedule = CheckpointSchedule(tmp_path, save_steps=3)
    with caplog.at_level(logging.WARNING):
        schedule.save_if_due(weighing(4), 3)
    schedule.close()
    assert "step 3 is not saved" in caplog.text
    assert (tmp_path / "global_step_3" / "manifest.json").read_bytes() == manifest
    assert resume(tmp_path) == (3, 3.0)


def test_without_a_directory_nothing_is_saved_and_a_path_is_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    schedule = CheckpointSchedule(save_steps=1)
    schedule.save_if_due(weighing(1), 1)
    assert schedule.resume(weighing(0)) == 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="there is no directory"):
        CheckpointSchedule(resume=str(tmp_path))
