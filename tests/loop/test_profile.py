"""Traces of steps: which steps and ranks have one, and what is in it."""

from __future__ import annotations

import gzip
import json
import os
import signal

import pytest
import torch
from torch import nn

from veomni.errors import ConfigError, DeviceError
from veomni.launcher import Launcher
from veomni.loop.profile import Profile
from veomni.loop.reporter import Reporter
from veomni.testing.ranks import RankFailed, run_cases, run_ranks

RANGES = {"data", "forward", "backward", "clip", "Optimizer.step#AdamW.step"}


def train(output_dir, steps, signalled=None, **options):
    """Take steps of two micro-batches; ``signalled`` is the rank and the step in which it sends itself SIGUSR2."""
    reporter = Reporter(output_dir, progress_bar=False, profile=Profile(**options))
    launcher = Launcher("ddp", accelerator="cpu", reporter=reporter)
    launcher.launch()
    model = launcher.setup_model(nn.Linear(2, 2))
    optimizer = launcher.setup_optimizer(model, torch.optim.AdamW)
    for step in launcher.track([[{"input": torch.ones(1, 2)}] * 2] * steps):
        for micro in launcher.accumulate(model, step):
            launcher.backward(model(**micro.inputs).square().mean(), micro)
        launcher.clip_grad_norm(model, 1.0)
        optimizer.step()
        if (launcher.rank, step.index) == signalled:
            os.kill(os.getpid(), signal.SIGUSR2)
        held_out = [[{"input": torch.ones(1, 2)}]]  # read by steps of their own, which agree on signals too
        launcher.evaluate(model, held_out, loss=lambda model, micro: model(**micro.inputs).square().mean())
    launcher.close()


def traces(output_dir):
    """The files that a run wrote, and of each the steps and the counts of our ranges inside of them."""
    found = {}
    for path in sorted((output_dir / "profile").glob("*")):
        events = [
            each for each in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if each.get("ph") == "X"
        ]
        spans = {each["name"]: each for each in events if each["name"].startswith("ProfilerStep#")}
        inside = dict.fromkeys(RANGES, 0)
        for event in events:
            begins = event["ts"]
            if event["name"] in RANGES and any(s["ts"] <= begins < s["ts"] + s["dur"] for s in spans.values()):
                inside[event["name"]] += 1
        found[path.name] = (sorted(spans), inside)
    return found


def ranges(steps):
    """Every range once per step, and those of micro-batches twice."""
    return {name: steps * (2 if name in ("forward", "backward") else 1) for name in RANGES}


def test_planned_steps_are_traced_on_the_ranks_that_are_named(tmp_path):
    cases = [
        lambda: train(tmp_path / "a", 8, first=2, count=2, every=3, ranks=[1]),
        lambda: train(tmp_path / "b", 2, first=1, count=5),  # the run ends before the trace
        lambda: train(tmp_path / "c", 2, first=3),  # and in the step that warms up
    ]
    assert not [found for found in run_cases(cases, 2, init=False) if isinstance(found, RankFailed)]
    assert traces(tmp_path / "a") == {
        f"trace_step_{first}-{first + 1 - (first == 8)}_rank_1.json.gz": (
            [f"ProfilerStep#{step}" for step in range(first, min(first + 2, 9))], ranges(2 - (first == 8))
        )
        for first in (2, 5, 8)
    }  # fmt: skip
    both = (["ProfilerStep#1", "ProfilerStep#2"], ranges(2))
    assert traces(tmp_path / "b") == {f"trace_step_1-2_rank_{rank}.json.gz": both for rank in (0, 1)}
    assert traces(tmp_path / "c") == {}


def test_a_signal_to_one_rank_has_all_ranks_trace_the_same_steps(tmp_path):
    run_ranks(train, 2, tmp_path, 8, (1, 2), count=2, init=False)
    expected = (["ProfilerStep#5", "ProfilerStep#6"], ranges(2))  # agreed on in step 3, warmed up in step 4
    assert traces(tmp_path) == {f"trace_step_5-6_rank_{rank}.json.gz": expected for rank in (0, 1)}


@pytest.mark.parametrize(
    ("options", "error", "field"),
    [
        ({"memory": True}, DeviceError, "Profile.memory"),
        ({"every": 3}, ConfigError, "Profile.every"),
        ({"first": 1, "count": 3, "every": 2}, ConfigError, "Profile.every"),
        ({"first": 1, "ranks": [0, 1]}, ConfigError, "Profile.ranks"),
    ],
)
def test_what_cannot_be_profiled_is_an_input_error(tmp_path, options, error, field):
    with pytest.raises(RankFailed) as failed:
        run_ranks(train, 1, tmp_path, 1, init=False, **options)
    (found,) = failed.value.exceptions.values()
    assert isinstance(found, error)
    assert found.field == field


def test_traces_need_a_directory():
    with pytest.raises(RankFailed, match="no directory for profiles"):
        run_ranks(train, 1, None, 1, first=1, init=False)
