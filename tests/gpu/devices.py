"""The devices of these tests: ``GPU_TESTS_ON=cuda`` takes the GPUs of this host, over NCCL; ``cpu`` two gloo ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from veomni.testing.ranks import RankFailed, run_cases

KIND = os.environ.get("GPU_TESTS_ON", "")
# By NVML: CUDA is not initialised here, so ranks can be forked.
COUNT = {"cuda": torch.cuda.device_count, "cpu": lambda: 2, "": lambda: 0}[KIND]()
RANKS = tuple(ranks for ranks in (1, 2, 4) if ranks <= COUNT)
on_gpus = pytest.mark.skipif(KIND != "cuda" or not COUNT, reason="run by make gpu, on GPUs")
two_devices = pytest.mark.skipif(COUNT < 2, reason="run by make gpu, on two GPUs or more")
# Not imported here, for the same reason.
TORCHAO = find_spec("torchao") is not None
LAUNCHER = {"accelerator": KIND, "backend": "auto", "timeout_seconds": 120.0}
"""Options of a launcher on these devices."""

SECONDS = 240.0
"""Of a case: kernels may be compiled in each of its processes."""


def on_devices(cases: Sequence[Callable[[], Any]], ranks: int) -> list[list[Any] | RankFailed]:
    """Run cases that launch, each of its ranks on a GPU of its own, as many side by side as there are cores for.

    GPUs give processes that share them turns of milliseconds, which ranks of one case wait for: six at most.
    """
    at_once = max(1, min(6, (os.cpu_count() or 1) // (3 * ranks)))
    return run_cases(cases, ranks, init=False, timeout=SECONDS, at_once=at_once)


def outcome_of(found: list[Any] | RankFailed) -> list[Any]:
    """Return what each rank returned, or raise how the case failed."""
    if isinstance(found, RankFailed):
        raise found
    return found
