"""What the host reads of tensors between log steps: on a device, each read waits for all that is queued before it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import veomni
from tests.models.tiny import tiny_config
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.strategies import FSDP2, ExpertParallel, Ulysses
from veomni.testing.ranks import run_ranks

LAYERS = 3
READS = {
    "item", "tolist", "cpu", "numpy", "nonzero", "unique", "unique_consecutive", "masked_select", "equal", "allclose",
    "__bool__", "__int__", "__float__", "__index__", "__contains__", "is_nonzero",
}  # fmt: skip
STRATEGIES = {
    "fsdp2": lambda: [FSDP2()],
    "ulysses": lambda: [FSDP2(), Ulysses(2)],
    "experts": lambda: [FSDP2(), ExpertParallel(2)],
}


class HostReads(TorchFunctionMode):
    """Counts calls that return values of tensors to Python, by the function of the library that makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func is Tensor.__getitem__ and any(_is_mask(each) for each in _entries(args[1]))
        if masks or getattr(func, "__name__", "") in READS:
            self.found[_caller()] += 1
        return func(*args, **(kwargs or {}))


def _entries(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _caller() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(Path(veomni.__file__).parent) or "transformers" in file.parts:
            return f"{file.name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


IDS = torch.arange(32).view(2, 16)
BATCHES = {
    "no positions": {},
    "a document in each row": {"position_ids": IDS % 16},
    "packed": {"position_ids": IDS % 16 % 5},
}


def reads(layout: str) -> list[Counter[str]]:
    """What each step but the first reads, from the forward to the reduction of the loss."""
    launcher = Launcher(STRATEGIES[layout](), accelerator="cpu", backend="gloo")
    launcher.launch()
    config = tiny_config("qwen3_moe" if layout == "experts" else "qwen3", num_hidden_layers=LAYERS)
    model = launcher.setup_model(build_model(config, weights="random")).train()
    optimizer = launcher.setup_optimizer(model, torch.optim.AdamW, lr=1e-3, fused=True)
    found = []
    for step in launcher.track([[{"input_ids": IDS, "labels": IDS, **more}] for more in [{}, *BATCHES.values()]]):
        mode = HostReads()
        for micro in launcher.accumulate(model, step):
            with mode:
                launcher.backward(model(**micro.inputs).loss, micro)
        with mode:
            launcher.clip_grad_norm(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            launcher.global_loss(step)
        found.append(mode.found)
    launcher.close()
    return found[1:]


@pytest.mark.parametrize("layout", STRATEGIES)
def test_reads_of_a_step(layout):
    norm = {"grad_norm.py:clip_gradients": 1}  # copied before the scaling, and read behind it
    sizes = {"exchange.py:_fit": LAYERS, "controller.py:_check_finite": 1} if layout == "experts" else {}
    for found in run_ranks(reads, 2, layout, init=False):
        assert dict(zip(BATCHES, found, strict=True)) == dict.fromkeys(BATCHES, norm | sizes)
