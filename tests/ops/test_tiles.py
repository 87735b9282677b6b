"""MLPs over tiles of tokens: which modules are found to be some, and that tiles change no number."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from tests.models.tiny import tiny_config
from veomni.models import build_model, derive_plan
from veomni.models.traits.tokenwise import find_mlps
from veomni.parallel.plan import ParallelPlan
from veomni.strategies.transforms.tiled_mlp import tiled

ROWS: list[int] = []
"""How many rows each call of an MLP got."""


class Gated(nn.Module):
    def __init__(self, dropout: float = 0.0, over_tokens: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 2 * 20), nn.Linear(20, 8)
        self.dropout, self.over_tokens = nn.Dropout(dropout), over_tokens

    def forward(self, hidden):
        ROWS.append(len(hidden))
        gate, up = self.up(hidden).chunk(2, -1)
        gate = gate.softmax(0) if self.over_tokens else nn.functional.silu(gate)
        return self.dropout(self.down(gate * up))


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), mlp

    def forward(self, hidden):
        return hidden + self.mlp(self.norm(hidden))


def replaced(mlp: nn.Module) -> nn.Module:
    mlp.up.forward = mlp.up.forward
    return mlp


def found_in(mlp: nn.Module) -> list[str]:
    return list(find_mlps(nn.ModuleList([Block(mlp)]), ParallelPlan(blocks=("0",))))


@pytest.mark.parametrize(
    "mlp", [Gated(), nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)), Gated().to("meta")]
)
def test_products_and_activations_of_single_tokens_are_an_mlp(mlp):
    assert found_in(mlp) == ["0.mlp"]


@pytest.mark.parametrize(
    "mlp",
    [
        Gated(over_tokens=True), Gated(dropout=0.5), Gated(dropout=0.5).eval(), replaced(Gated()),
        nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.Linear(24, 8)),
        nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 16)), nn.Linear(8, 8),
    ],
    ids=[
        "mixes tokens", "draws", "draws in training", "has another product", "has a norm", "has another width",
        "is one product",
    ],
)  # fmt: skip
def test_other_modules_are_none(mlp):
    assert found_in(mlp) == []


@pytest.mark.parametrize(("name", "part"), [("phi3", "mlp"), ("qwen2_moe", "mlp.shared_expert"), ("gpt_oss", None)])
def test_mlps_of_transformers(name, part):
    model = build_model(tiny_config(name), weights="random")
    expected = [] if part is None else [f"model.layers.{layer}.{part}" for layer in range(2)]
    assert list(find_mlps(model, derive_plan(model))) == expected


def gradients(mlp, forward, hidden):
    mlp.zero_grad()
    given = hidden.clone().requires_grad_()
    result = forward(given)
    result.backward(torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result))
    return [result.detach(), given.grad, *(p.grad for p in mlp.parameters())]


@pytest.mark.parametrize("tokens", [1, 4, 10**30])
@pytest.mark.parametrize("frozen", [False, True])
def test_tiles_change_no_number(tokens, frozen):
    mlp = Gated().double()
    mlp.up.weight.requires_grad_(not frozen)
    hidden = torch.randn(2, 7, 8, dtype=torch.float64)
    whole = gradients(mlp, mlp.forward, hidden)
    ROWS.clear()
    for found, expected in zip(gradients(mlp, tiled(mlp, tokens), hidden), whole, strict=True):
        assert (found is None) == (expected is None)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert max(ROWS) == min(tokens, 14)  # rows that were between its products at once


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, hidden):
        return hidden * self.factor


def scaled(factor: float) -> nn.Module:
    mlp = nn.Sequential(nn.Linear(8, 8), Scaled(factor), nn.Linear(8, 8)).double()
    mlp[2].weight = mlp[0].weight
    return mlp


@pytest.mark.parametrize("factor", [1.0, 3.0])  # each of two models in one process computes its own
def test_tied_weights_and_attributes_of_inner_modules(factor):
    mlp, hidden = scaled(factor), torch.randn(5, 8, dtype=torch.float64)
    for found, expected in zip(gradients(mlp, tiled(mlp, 2), hidden), gradients(mlp, mlp.forward, hidden), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_weights_are_rounded_once():
    """In bf16, 64 tiles are as near to float64 as one product; sums in bf16 are seven times as far."""
    torch.manual_seed(0)
    mlp, hidden = Gated().bfloat16(), torch.randn(256, 8, dtype=torch.bfloat16)
    wide = deepcopy(mlp).double()
    exact = gradients(wide, wide.forward, hidden.double())[2]
    found = [gradients(mlp, forward, hidden)[2].double() for forward in (mlp.forward, tiled(mlp, 4))]
    once, tiles = ((each - exact).norm() / exact.norm() for each in found)
    assert tiles < 1.2 * once
