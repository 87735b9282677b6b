"""The compiled step of AdamW with 8-bit moments, beside the one that is not compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from veomni.optim import build_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytest.importorskip("torchao")


def trained(stance):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()
    optimizer = build_optimizer(model, "adamw_8bit", lr=1e-3)
    with torch.compiler.set_stance(stance):
        for step in range(8):
            rows = torch.randn(32, 256, generator=torch.Generator().manual_seed(step)).cuda()
            model(rows).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_compiled_step_is_that_of_the_operations():
    start = trained("force_eager")
    torch.testing.assert_close(trained("default"), start, rtol=0, atol=1e-4)  # a tenth of one step's rate
