"""The allocator's history on a GPU: beside a trace, and where memory runs out."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from tests.gpu.devices import on_gpus
from veomni.launcher import Launcher
from veomni.loop.profile import Profile
from veomni.loop.reporter import Reporter
from veomni.testing.ranks import RankFailed, run_ranks

pytestmark = on_gpus


def train(output_dir, *, too_much):
    reporter = Reporter(output_dir, progress_bar=False, profile=Profile(first=2, memory=True))
    launcher = Launcher("fsdp2", accelerator="cuda", reporter=reporter)
    launcher.launch()
    model = launcher.setup_model(nn.Linear(64, 64))
    for step in launcher.track([[{"input": torch.ones(4, 64)}]] * 2):
        for micro in launcher.accumulate(model, step):
            launcher.backward(model(**micro.inputs).square().mean(), micro)
        if too_much:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
    launcher.close()


def frames(path):
    """The names of the functions that allocated."""
    traces = pickle.loads(path.read_bytes())["device_traces"][0]
    return {frame["name"] for event in traces for frame in event.get("frames", [])}


def test_a_trace_has_kernels_and_the_allocations_are_beside_it(tmp_path):
    run_ranks(train, 1, tmp_path, too_much=False, init=False)
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert names == ["memory_step_2-2_rank_0.pickle", "trace_step_2-2_rank_0.json.gz"]
    assert {"train", "backward"} <= frames(tmp_path / "profile" / names[0])


def test_what_was_allocated_is_written_where_memory_runs_out(tmp_path):
    with pytest.raises(RankFailed) as failed:
        run_ranks(train, 1, tmp_path, too_much=True, init=False)
    assert isinstance(failed.value.exceptions[0], torch.OutOfMemoryError)
    found = pickle.loads((tmp_path / "profile" / "memory_out_of_memory_rank_0.pickle").read_bytes())
    assert any(event["action"] == "oom" for event in found["device_traces"][0])
