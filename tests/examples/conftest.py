"""What the runs of the example script share: a small corpus, and imports that forked ranks then need not repeat."""

from __future__ import annotations

import importlib

import pytest

from tests.examples.script import ROOT

WARM = (
    "matplotlib.pyplot", "sklearn.datasets", "torch._dynamo", "torch.distributed.checkpoint",
    "torchmetrics.classification", "transformers.generation", "transformers.models.qwen3.modeling_qwen3",
    "veomni.data", "veomni.run_config",
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _warm():
    """Import here what every rank would import."""
    for module in WARM:
        importlib.import_module(module)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for index, path in enumerate(sorted((ROOT / "veomni").glob("*.py"))):
        (folder / f"{index:02d}.txt").write_text(path.read_text())
    return folder
