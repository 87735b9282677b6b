"""Between log steps no call waits for the device, and copies are made from page-locked memory.

What of it shows without a GPU is in ``tests/loop/test_host_reads.py``; reads of a ``HostCopy`` wait for an event, with
work queued behind it, and are not counted here.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.devices import on_gpus, two_devices
from tests.loop.test_host_reads import BATCHES, IDS, LAYERS, STRATEGIES
from tests.models.tiny import tiny_config
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.strategies import Compile
from veomni.testing.ranks import run_ranks

pytestmark = [on_gpus, two_devices]
WARM, COUNTED = 3, 2  # kernels are compiled and memory is pinned in the first steps


def train(launcher: Launcher, batch: dict[str, Any], layout: str) -> tuple[Counter[str], list[str]]:
    """Files whose calls waited in the counted steps, and copies of the step behind them that were not page-locked."""
    config = tiny_config("qwen3_moe" if layout == "experts" else "qwen3", num_hidden_layers=LAYERS)
    model = launcher.setup_model(build_model(config, weights="random")).train()
    optimizer = launcher.setup_optimizer(model, torch.optim.AdamW, lr=1e-3, fused=True)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in launcher.track([[batch]] * (WARM + COUNTED + 2)):
            if step.index == WARM + COUNTED + 1:
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
                profiler.start()
            for micro in launcher.accumulate(model, step):
                launcher.backward(model(**micro.inputs).loss, micro)
            launcher.clip_grad_norm(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            launcher.global_loss(step)
            if step.index == WARM:
                caught.clear()
                torch.cuda.set_sync_debug_mode("warn")
        torch.cuda.synchronize()
        profiler.stop()
    waits = [each for each in caught if "synchronizing CUDA operation" in str(each.message)]
    return Counter(Path(each.filename).name for each in waits), [
        event.name for event in profiler.events() if "Pageable -> Device" in event.name
    ]


def waits(layout: str, compiled: bool) -> dict[str, tuple[Counter[str], list[str]]]:
    found = {}
    for name, more in BATCHES.items():
        launcher = Launcher([*STRATEGIES[layout](), *[Compile()] * compiled], accelerator="cuda", precision="bf16")
        launcher.launch()
        found[name] = train(launcher, {"input_ids": IDS, "labels": IDS, **more}, layout)
        launcher.close()
    return found


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layout", STRATEGIES)
def test_waits_of_a_step(layout, compiled):
    for found in run_ranks(waits, 2, layout, compiled, init=False, timeout=240.0):
        assert found == dict.fromkeys(BATCHES, (Counter(), []))
