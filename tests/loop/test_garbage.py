"""Python's garbage is collected at one step on all ranks, and the collector is as it was after every end of a loop."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from veomni.errors import LoopError
from veomni.launcher import Launcher
from veomni.testing.ranks import run_ranks

STEPS = 10


class Circle:
    """Garbage that only the collector frees."""

    def __init__(self):
        self.own = self


def launched(strategy="single"):
    launcher = Launcher(strategy, accelerator="cpu", backend="gloo")
    launcher.launch()
    return launcher


def collections(gc_steps):
    """Where Python collected: the step that was over, and whether it did so inside of the loop's body."""
    launcher, inside, found = launched("ddp"), False, []
    model = launcher.setup_model(nn.Linear(2, 2))
    record = lambda phase, info: phase == "start" and found.append((launcher.step, inside))  # noqa: E731
    gc.callbacks.append(record)
    for step in launcher.track([[{"input": torch.ones(1, 2)}]] * STEPS, gc_steps=gc_steps):
        inside = True
        for micro in launcher.accumulate(model, step):
            launcher.backward(model(**micro.inputs).sum(), micro)
            circles = [Circle() for _ in range(2000 * (1 + launcher.rank))]
            del circles
        inside = False
    gc.callbacks.remove(record)
    launcher.close()
    return found


def test_all_ranks_collect_before_the_same_steps():
    for found in run_ranks(collections, 2, 4, init=False):
        assert (1, False) in found  # the first step is part of set-up
        assert [each for each in found if each[0] > 1] == [(3, False), (7, False)]


def test_without_a_schedule_python_collects_inside_of_steps():
    found = run_ranks(collections, 2, None, init=False)
    assert all(any(inside and step > 1 for step, inside in each) for each in found)


def state():
    return gc.isenabled(), gc.get_freeze_count()


def advanced(launcher, **options):
    """A loop that is in its third step."""
    loop = launcher.track([[{"input": torch.ones(1, 2)}]] * STEPS, **options)
    return loop, [next(loop) for _ in range(3)]


def fail_in_third_step(launcher):
    for step in launcher.track([[{"input": torch.ones(1, 2)}]] * STEPS):
        1 / (step.index - 3)


def ends():
    """The collector's state during and after loops that end in different ways."""
    gc.unfreeze()
    launcher, found = launched(), {"before": state()}
    for step in launcher.track([[{"input": torch.ones(1, 2)}]] * 3):
        step.check_complete()
    found["end of the data"] = state()
    for step in launcher.track([[{"input": torch.ones(1, 2)}]] * STEPS, max_steps=STEPS):
        if step.index > 5:
            break
    found["break"] = state()
    launcher.step = 0
    with pytest.raises(ZeroDivisionError):
        fail_in_third_step(launcher)
    found["error"] = state()
    (first, _), (second, _) = advanced(launcher), advanced(launcher)
    during = state()
    first.close()
    found["one of two"] = state()
    second.close()
    found["both"] = state()
    gc.disable()
    advanced(launcher)[0].close()
    found["off before"] = state()
    gc.freeze()
    loop, _ = advanced(launcher)
    loop.close()
    launcher.close()
    return found, during, gc.get_freeze_count()


def test_the_collector_is_as_before_after_every_end():
    ((found, (enabled, frozen), kept),) = run_ranks(ends, 1, init=False)
    on, off = (True, 0), (False, 0)
    assert not enabled
    assert frozen > 1000
    assert not found.pop("one of two")[0]
    assert found == {
        "before": on, "end of the data": on, "break": on, "error": on, "both": on, "off before": off
    }  # fmt: skip
    assert kept > 1000  # what was frozen before the loop was left alone


class Reports(torch.utils.data.Dataset):
    """Whether the process that reads it collects automatically."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor(float(gc.isenabled()))


def seen_by_workers():
    launcher = launched()
    workers = DataLoader(Reports(), batch_size=1, num_workers=1, multiprocessing_context="fork")
    loader = launcher.setup_dataloader(workers, epochs=2)
    found = [step.micro_batches[0].args[0].item() for step in launcher.track(loader)]
    launcher.close()
    return found


def test_workers_that_are_forked_meanwhile_collect_automatically():
    assert run_ranks(seen_by_workers, 1, init=False) == [[1.0] * 8]


def test_steps_below_one_are_rejected():
    def loop():
        launched().track([[{"input": torch.ones(1, 2)}]], gc_steps=0)

    with pytest.raises(AssertionError, match="gc_steps is 0") as failed:
        run_ranks(loop, 1, init=False)
    assert isinstance(failed.value.exceptions[0], LoopError)
