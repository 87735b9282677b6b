"""Moments in bfloat16: what stochastic rounding keeps of an average, and that it is the same in every layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.optim.layouts import LAYOUTS, MATRICES, give_gradients, laid_out, new_model, values
from veomni.errors import ConfigError
from veomni.optim import build_optimizer
from veomni.optim.stochastic_rounding import element_numbers, mix, round_to_bfloat16
from veomni.testing.ranks import run_ranks

DRAWS = 4096
CPU = torch.device("cpu")


def draws(key: int) -> torch.Tensor:
    return mix(element_numbers([slice(0, DRAWS)], [DRAWS], CPU) ^ key)


@pytest.mark.parametrize("value", [1.0, -1.00317, 3.3e-7, -65000.7, 1.9999, 1e-40, 0.0])
def test_the_mean_of_roundings_is_the_value_and_each_is_a_neighbour(value):
    number = torch.tensor(value)
    rounded = round_to_bfloat16(number.expand(DRAWS).contiguous(), (draws(7) & 0xFFFF).int()).double()
    near = number.bfloat16()
    ends = [near.double(), *(torch.nextafter(near, torch.tensor(end).bfloat16()).double() for end in (-1e9, 1e9))]
    assert all(any(each == end for end in ends) for each in rounded.unique())
    step = (ends[2] - ends[1]).item() / 2
    deviation = step / 2 / DRAWS**0.5
    assert abs(rounded.mean().item() - number.double().item()) <= 4 * deviation
    assert len(rounded.unique()) == (1 if number == near else 2)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000])  # a GPU's NaN first
def test_what_is_not_finite_stays_so(bits):
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    rounded = round_to_bfloat16(value.expand(DRAWS).contiguous(), (draws(7) & 0xFFFF).int())
    torch.testing.assert_close(rounded, value.bfloat16().expand(DRAWS), rtol=0, atol=0, equal_nan=True)


def test_bits_of_elements_steps_and_moments_are_not_correlated():
    steps = [draws(mix(step)) for step in range(8)]
    drawn = [part.double() for bits in steps for part in (bits & 0xFFFF, bits >> 16)]
    table = torch.stack([*drawn, drawn[0].roll(1), drawn[0].roll(64), drawn[1].roll(1)])
    off = torch.corrcoef(table) - torch.eye(len(table))
    assert off.abs().max() < 5 / DRAWS**0.5
    assert ((table / 65536).mean(1) - 0.5).abs().max() < 5 * (1 / 12 / DRAWS) ** 0.5


def test_a_slow_mean_stalls_when_rounded_to_nearest_and_not_stochastically():
    """The mean of squares of gradients of 1, with decay 0.999, is 1 - 0.999^t; a change of it is below half a step."""
    nearest, model = torch.zeros((), dtype=torch.bfloat16), nn.Linear(64, 64, bias=False)
    optimizer = build_optimizer(model, "adamw_bf16", lr=1e-3, betas=(0.9, 0.999), no_decay=())
    for _ in range(1500):
        nearest = (nearest.float() * 0.999 + 0.001).bfloat16()
        model.weight.grad = torch.ones(64, 64)
        optimizer.step()
    truth, found = 1 - 0.999**1500, optimizer.state[model.weight]["exp_avg_sq"]
    assert nearest == 0.25
    assert truth > 0.77
    assert found.dtype == torch.bfloat16
    assert found.double().mean().item() == pytest.approx(truth, rel=1e-3)
    assert found.double().std() < 0.05 * truth


def trained(options: dict, dtype: torch.dtype, name: str = "adamw_bf16") -> torch.Tensor:
    """The way that a matrix goes in 300 steps of noisy gradients."""
    model = nn.Linear(64, 64, bias=False).to(dtype)
    nn.init.zeros_(model.weight)
    optimizer = build_optimizer(model, name, no_decay=(), **options)
    generator = torch.Generator().manual_seed(5)
    slope = torch.linspace(-1, 1, 4096, dtype=torch.float64).view(64, 64)
    for _ in range(300):
        model.weight.grad = (slope + torch.randn(64, 64, dtype=torch.float64, generator=generator)).to(dtype)
        optimizer.step()
    return model.weight.detach().double()


def test_it_goes_the_way_of_adamw_in_float64():
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.1}
    found, truth = trained(options, torch.float32), trained(options, torch.float64, "adamw")
    error = found - truth
    assert error.norm() < 0.01 * truth.norm()
    assert abs(error.mean()) < 4 * error.std() / 64  # and is not biased


def stepped(layout: str, name: str = "adamw_bf16", **options: str) -> dict[str, torch.Tensor]:
    model = laid_out(layout, new_model(torch.float32))
    optimizer = build_optimizer(model, name, lr=1e-2, lr_scale={"embed": 0.5}, **options)
    for step in range(3):
        give_gradients(model, step, skip=("layers.0.norm.weight",) if step == 1 else ())
        optimizer.step()
    return values(model)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2_4", "hsdp", "ep2_fsdp2", "ep2_fsdp2_columns", "hsdp_ep2"])
def test_every_layout_rounds_alike(layout):
    (truth,) = run_ranks(stepped, 1, "single")
    for found in run_ranks(stepped, LAYOUTS[layout], layout):
        for name, value in truth.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_what_is_beside_muons_matrices_has_them_too():
    found, bf16, plain = stepped("single", "muon", moments="bf16"), stepped("single"), stepped("single", "muon")
    for name, value in found.items():
        assert torch.equal(value, (plain if name in MATRICES else bf16)[name]), name
    with pytest.raises(ConfigError, match="fused has no meaning"):
        build_optimizer(new_model(torch.float32), "muon", moments="bf16", fused=True)
