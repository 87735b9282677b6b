"""What these tests share: no test without a device, imports before the forks, and what the page of runs is made of."""

from __future__ import annotations

import importlib
import os
import subprocess

import pytest
import torch

from tests.gpu.devices import COUNT, KIND, on_devices, outcome_of

# Of tiny steps that run side by side: a communicator takes memory by channel, and every case makes several.
os.environ.setdefault("NCCL_MAX_CTAS", "2")
# The check for GPUs may not initialise CUDA before the forks.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

WARM = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "veomni.checkpoint",
    "veomni.optim",
)


def pytest_collection_modifyitems(items):
    if COUNT == 0:
        for item in items:
            if "tests/gpu/" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="run by make gpu, on GPUs"))


def describe() -> str:
    return torch.get_device_module(KIND).get_device_name() if KIND != "cpu" else "CPU"


@pytest.fixture(scope="session", autouse=True)
def run(record_testsuite_property):
    """Import here what every rank would import, and record what ran where."""
    for module in WARM:
        importlib.import_module(module)
    ((device,),) = map(outcome_of, on_devices([describe], 1))
    record = record_testsuite_property
    record("devices", f"{COUNT} x {device}")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if KIND == "cuda" else ""
    record("backend", f"NCCL {nccl}" if nccl else "gloo")
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    record("commit", os.environ.get("COMMIT") or described.stdout.strip() or "unknown")  # a copy of the tree has no git
