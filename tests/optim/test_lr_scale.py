"""Parts of a model with a learning rate of their own, in every layout."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tests.optim.test_groups import Block, Model
from veomni.errors import ConfigError
from veomni.optim import build_optimizer, build_scheduler
from veomni.testing.ranks import run_ranks

RATES = {"layers.0": 0.5, "*.experts": 0.1, "norm": 0.25}


def moved(layout: str) -> dict[str, float]:
    """How far a step of SGD at rate 1 takes each parameter whose gradient is 1 throughout."""
    torch.manual_seed(0)
    model: torch.nn.Module = Model()
    if layout == "fsdp2":
        for block in model.layers:
            fully_shard(block)
        model = fully_shard(model)
    if layout == "fsdp1":
        model = FullyShardedDataParallel(
            model, auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=True, device_id=torch.device("cpu")
        )
    optimizer = build_optimizer(model, "sgd", lr=2.0, weight_decay=0.0, momentum=0.0, lr_scale=RATES)
    build_scheduler(optimizer, name="constant", total_steps=4, warmup_steps=1)  # half of the peak
    before = {name: whole(parameter) for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    distances = {name: before[name] - whole(parameter) for name, parameter in model.named_parameters()}
    assert optimizer.param_groups[0]["lr"] == 1.0  # what is logged
    return {name: round(float(d.mean()), 5) for name, d in distances.items() if d.numel()}


def whole(parameter: torch.Tensor) -> torch.Tensor:
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach().clone()


def expected(name: str) -> float:
    if name.endswith("experts"):
        return 0.1  # the last pattern that matches counts
    if ".layers.0." in f".{name}":
        return 0.5
    return 0.25 if name.split(".")[-2] == "norm" else 1.0


@pytest.mark.parametrize(("layout", "ranks"), [("single", 1), ("fsdp2", 2), ("fsdp1", 2)])
def test_every_parameter_moves_at_its_own_rate(layout, ranks):
    for distances in run_ranks(moved, ranks, layout):
        assert len(distances) >= 3
        for name, distance in distances.items():
            clean = name.replace("_fsdp_wrapped_module.", "")
            assert distance == pytest.approx(expected(clean)), clean


def test_all_rates_appear():
    (distances,) = run_ranks(moved, 1, "single")
    assert set(distances.values()) == {1.0, 0.5, 0.25, 0.1}


@pytest.mark.parametrize(
    ("rates", "message"), [({"layres.0": 0.5}, "did you mean"), ({"layers.0": 0.0}, "greater than 0")]
)
def test_wrong_rates_are_rejected(rates, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(Model(), lr_scale=rates)


def test_a_wrong_rate_beside_an_optimizer_class_names_the_function():
    with pytest.raises(ConfigError, match=r"build_optimizer\.lr_scale.* is 0\.0"):
        build_optimizer(Model(), torch.optim.SGD, lr=1.0, lr_scale={"layers.0": 0.0})
