"""The compiled steps of AdamW with moments of 8 bits and of bfloat16, beside those that are not compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.gpu.devices import TORCHAO, on_gpus
from veomni.optim import build_optimizer
from veomni.testing.ranks import run_ranks

pytestmark = on_gpus


def flat(model):
    return torch.cat([parameter.detach().flatten().cpu() for parameter in model.parameters()])


def trained(name, stance):
    """How far eight steps move every parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()
    optimizer = build_optimizer(model, name, lr=1e-3)
    start = flat(model)
    with torch.compiler.set_stance(stance):
        for step in range(8):
            rows = torch.randn(32, 256, generator=torch.Generator().manual_seed(step)).cuda()
            model(rows).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return flat(model) - start


EIGHT_BITS = pytest.param("adamw_8bit", marks=pytest.mark.skipif(not TORCHAO, reason="needs torchao"))


@pytest.mark.parametrize("name", [EIGHT_BITS, "adamw_bf16"])
def test_the_compiled_step_is_that_of_the_operations(name):
    (operations,), (compiled,) = (
        run_ranks(trained, 1, name, stance, init=False, timeout=240) for stance in ("force_eager", "default")
    )
    # A moment between two codes is rounded to either: single parameters differ, by a tenth of one step's rate.
    assert (compiled - operations).norm() <= 1e-3 * operations.norm()
    assert (compiled - operations).abs().max() <= 1e-3
