"""A module that has values when it is set up gets those of rank 0, whatever their dtypes, strides and sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from veomni.launcher import Launcher
from veomni.models import unwrap
from veomni.strategies import DDP, FSDP1, FSDP2
from veomni.testing.ranks import run_ranks
from veomni.testing.step import full_gradients


class Mixed(nn.Module):
    """Two layers that share a weight, and buffers of other dtypes, strides and sizes, one of them empty."""

    def __init__(self, seed):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=random)
        self.register_buffer("turned", torch.rand(5, 6, generator=random).t())
        self.register_buffer("whole", torch.randint(0, 1000, (7,), generator=random))
        self.register_buffer("flags", torch.rand(9, generator=random) > 0.5)
        self.register_buffer("scalar", torch.rand((), generator=random))
        self.register_buffer("nothing", torch.empty(0))

    def forward(self, x):
        return self.second(self.first(x)).square().mean()


def set_up(strategy, x):
    launcher = Launcher(strategy(), accelerator="cpu", precision="fp64")
    launcher.launch()
    model = launcher.setup_model(Mixed(seed=launcher.rank))
    loss = model(x)
    loss.backward()
    buffers = {name: buffer.clone() for name, buffer in unwrap(model).named_buffers()}
    launcher.close()
    return loss.detach(), full_gradients(model), buffers


@pytest.mark.parametrize("strategy", [DDP, FSDP1, FSDP2])
def test_every_rank_has_the_values_of_rank_zero(strategy):
    x = torch.rand(4, 6, dtype=torch.float64)
    expected = Mixed(seed=0)
    kept = dict(expected.named_buffers())
    expected = expected.double()
    loss = expected(x)
    loss.backward()
    for found, gradients, buffers in run_ranks(set_up, 2, strategy, x, init=False):
        torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0)
        assert gradients.keys() == {name for name, _ in expected.named_parameters()}
        for name, parameter in expected.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-12, atol=1e-15)
        assert buffers.keys() == kept.keys()
        for name, buffer in kept.items():
            assert torch.equal(buffers[name], buffer), name
