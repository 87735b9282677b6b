"""Every family on a GPU: one step's loss and gradients against transformers' forward of each document on the CPU.

In float64 the arithmetic is checked (rotary tables are float32, whose last bit differs between devices), in bf16 that
the kernels chosen there are given what they take.
"""

from __future__ import annotations

import pytest
import torch

from tests.models.multimodal import FAMILIES, IMAGES, MROPE, SOUNDS, family_config, worst
from tests.strategies.media import AUDIO, IMAGE, ROW, TEXT, VIDEO, documents_of, true_step, weights_of
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.strategies import Single

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
_MOE = ("qwen3_vl_moe", "qwen3_omni_moe_thinker")


def step_of(name):
    """Two micro-batches of what the family takes, and of text alone."""
    given = [part for part, takes in ((IMAGE, IMAGES), (VIDEO, MROPE), (AUDIO, SOUNDS)) if name in takes]
    return [[[part, TEXT] for part in given], [[TEXT, TEXT]]]


def on_gpu(name, precision):
    launcher = Launcher(Single(), accelerator="cuda", devices=1, precision=precision)
    launcher.launch()
    model = launcher.setup_model(build_model(weights_of(name))).train()
    collate = MultimodalCollator(family_config(name), max_seq_len=ROW)
    micro_batches = [collate([row]) for rank in documents_of(name, step_of(name)) for row in rank]
    for batch in launcher.track([micro_batches]):
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        loss = launcher.global_loss(batch).item()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    launcher.close()
    return loss, gradients


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("precision", "bound"), [("fp64", 1e-6), ("bf16", 0.12)])
def test_a_step_on_a_gpu(name, precision, bound):
    expected_loss, expected = true_step(name, documents_of(name, step_of(name)))
    loss, found = on_gpu(name, precision)
    assert loss == pytest.approx(expected_loss, rel=bound / 3)
    given = {key: found[key] for key in expected}
    if precision == "fp64":
        assert worst(given, expected) <= bound
    elif name not in _MOE:  # in bf16 some token chooses another expert
        whole = torch.cat([(given[key] - value).flatten() for key, value in expected.items()]).norm()
        assert whole <= bound * torch.cat([value.flatten() for value in expected.values()]).norm()
