"""Steps of the optimizers against the formulas of their papers, fused and sharded."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tests.config.samples import config
from veomni.errors import ConfigError
from veomni.optim import AdamWBF16, build_optimizer
from veomni.testing.ranks import run_ranks

OPTIONS = {"lr": 0.01, "weight_decay": 0.3, "no_decay": ()}
OWN = {"adamw": {"betas": (0.8, 0.9), "eps": 1e-3}, "sgd": {"momentum": 0.7}}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 1)).double()


def gradients(step: int, network: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in network.parameters()]


def train(network: nn.Module, name: str, steps: int = 4, whole_gradients=False, **options) -> torch.optim.Optimizer:
    optimizer = build_optimizer(network, name, **OPTIONS, **OWN[name], **options)
    whole = model()
    for step in range(steps):
        for parameter, gradient in zip(network.parameters(), gradients(step, whole), strict=True):
            parameter.grad = shard_like(gradient, parameter, whole_gradients)
        optimizer.step()
    return optimizer


def shard_like(gradient: Tensor, parameter: Tensor, whole: bool) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    if isinstance(parameter, DTensor):
        placements = [Replicate()] * parameter.device_mesh.ndim if whole else parameter.placements
        return distribute_tensor(gradient, parameter.device_mesh, placements)
    return gradient


def adamw(steps: int = 4) -> list[Tensor]:
    """Loshchilov and Hutter, algorithm 2."""
    network, (beta1, beta2) = model(), OWN["adamw"]["betas"]
    results = []
    for index, parameter in enumerate(network.parameters()):
        value, first, second = parameter.detach().clone(), 0.0, 0.0
        decay = OPTIONS["weight_decay"] if value.ndim > 1 else 0.0
        for step in range(steps):
            gradient = gradients(step, network)[index]
            first = beta1 * first + (1 - beta1) * gradient
            second = beta2 * second + (1 - beta2) * gradient**2
            direction = (first / (1 - beta1 ** (step + 1))) / (
                (second / (1 - beta2 ** (step + 1))).sqrt() + OWN["adamw"]["eps"]
            )
            value = value - OPTIONS["lr"] * (direction + decay * value)
        results.append(value)
    return results


def sgd(steps: int = 4) -> list[Tensor]:
    network, results = model(), []
    for index, parameter in enumerate(network.parameters()):
        value, velocity = parameter.detach().clone(), 0.0
        decay = OPTIONS["weight_decay"] if value.ndim > 1 else 0.0
        for step in range(steps):
            velocity = OWN["sgd"]["momentum"] * velocity + gradients(step, network)[index] + decay * value
            value = value - OPTIONS["lr"] * velocity
        results.append(value)
    return results


def assert_equal(network_values: list[Tensor], expected: list[Tensor]) -> None:
    for value, truth in zip(network_values, expected, strict=True):
        torch.testing.assert_close(value.detach(), truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(("name", "truth"), [("adamw", adamw), ("sgd", sgd)])
def test_steps_follow_the_formula(name, truth, fused) -> None:
    network = model()
    optimizer = train(network, name, fused=fused)
    assert bool(optimizer.param_groups[0]["fused"]) is (fused is None)
    assert_equal(list(network.parameters()), truth())


def sharded(name: str, mixed: bool, whole_gradients: bool = False) -> tuple[bool, list[Tensor]]:
    network = model()
    fully_shard(network[0])
    if not mixed:
        fully_shard(network)
    optimizer = train(network, name, whole_gradients=whole_gradients)
    fused = all(group["fused"] for group in optimizer.param_groups)
    return fused, [p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach() for p in network.parameters()]


@pytest.mark.parametrize(("name", "truth"), [("adamw", adamw), ("sgd", sgd)])
@pytest.mark.parametrize("mixed", [False, True])
def test_sharded_parameters_take_the_same_steps(name, truth, mixed) -> None:
    """The last layer is one row: of two ranks, one has nothing of it."""
    for fused, values in run_ranks(sharded, 2, name, mixed):
        assert fused is (name == "adamw")  # of several meshes, each has an optimizer of its own
        assert_equal(values, truth())


def test_gradients_may_be_whole_where_parameters_are_sharded() -> None:
    for _, values in run_ranks(sharded, 2, "adamw", mixed=True, whole_gradients=True):
        assert_equal(values, adamw())


def test_devices_without_a_fused_kernel_are_named(caplog) -> None:
    with torch.device("meta"):
        network = nn.Linear(2, 2)
    optimizer = build_optimizer(network, name="adamw", **OPTIONS)
    assert not optimizer.param_groups[0]["fused"]
    assert "not fused: its parameters are on meta (unsharded)" in caplog.text


def test_the_section_of_a_configuration_has_the_defaults_of_the_function() -> None:
    built = config().train.optimizer.build(model())
    for optimizer in (built, build_optimizer(model(), "adamw")):
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
        assert math.isclose(optimizer.param_groups[0]["lr"], 3e-4)
        assert tuple(optimizer.param_groups[1]["betas"]) == (0.9, 0.95)


def test_an_unknown_name_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"(?s)no optimizer is called 'adam'.*did you mean 'adamw'"):
        build_optimizer(model(), name="adam", **OPTIONS)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("adamw", {"lr": "1e-3"}, r"(?s)lr is '1e-3'.*valid number"),
        ("adamw", {"lr": -1.0}, r"(?s)lr is -1.0.*greater than or equal to 0"),
        ("sgd", {"momentum": 1.0}, r"(?s)momentum is 1.0.*less than 1"),
        ("adamw", {"no_decay": "norm"}, "no_decay is 'norm'"),
        ("muon", {"momentun": 0.9}, r"(?s)momentun is not a key.*did you mean 'momentum'"),
        (AdamWBF16, {"lr": -1.0}, r"(?s)lr is -1.0.*greater than or equal to 0"),
        (AdamWBF16, {"betas": 0.9}, "betas is 0.9"),
        (torch.optim.AdamW, {"lr": "1e-3"}, "the optimizer AdamW: .*str"),
        (torch.optim.AdamW, {"momentum": 0.9}, "the optimizer AdamW: .*momentum"),
        (torch.optim.AdamW, {"weight_decay": "0.1"}, "weight_decay is '0.1'"),
    ],
)
def test_options_of_a_wrong_name_type_or_range_are_rejected(name, wrong, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(model(), name, **wrong)
