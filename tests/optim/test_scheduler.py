"""Every step of every schedule against its closed form, and resumed schedules."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from veomni.errors import ConfigError
from veomni.optim import build_scheduler

PEAKS = (0.5, 0.125)
SHAPE = {"name": "cosine", "total_steps": 30, "warmup_steps": 4, "min_lr_ratio": 0.1}


def optimizer() -> torch.optim.Optimizer:
    layers = [nn.Linear(1, 1), nn.Linear(1, 1)]
    return torch.optim.SGD([{"params": layer.parameters(), "lr": lr} for layer, lr in zip(layers, PEAKS, strict=True)])


def start(**shape) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    made = optimizer()
    return made, build_scheduler(made, **{**SHAPE, **shape})


def rates(made, scheduler, steps: int) -> list[tuple[float, ...]]:
    """The rates that ``steps`` optimizer steps are taken with."""
    found = []
    for _ in range(steps):
        found.append(tuple(group["lr"] for group in made.param_groups))
        made.step()
        scheduler.step()
    return found


WSD = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: math.cos(math.pi * done / 2) ** 2,
    "sqrt": lambda done: 1 - done**0.5,
}


def warmup_stable_decay(step: int, total: int, warmup: int, minimum: float, decay: int, shape: str) -> float:
    """MiniCPM, section 4.2: proportional to the step, then constant, then a falling function."""
    if step < warmup:
        return float(Fraction(step + 1, warmup + 1))
    done = float(Fraction(max(0, min(step, total) - (total - decay)), decay))
    return minimum + (1 - minimum) * WSD[shape](done)


def closed_form(step: int, name: str, total: int, warmup: int, minimum: float) -> float:
    if step < warmup:
        return float(Fraction(step + 1, warmup + 1))
    if name == "constant":
        return 1.0
    done = float(Fraction(step - warmup, total - warmup)) if step < total else 1.0
    if name == "linear":
        return (1 - done) + done * minimum
    return minimum + (1 - minimum) * math.cos(math.pi * done / 2) ** 2  # (1 + cos x) / 2 = cos(x / 2)^2


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("total", "warmup"), [(30, 4), (30, 0), (30, 1), (30, 29), (30, 30), (1, 0), (1, 1)])
@pytest.mark.parametrize("minimum", [0.0, 0.1, 1.0])
def test_every_step_is_the_closed_form(name, total, warmup, minimum) -> None:
    shape = {"name": name, "total_steps": total, "warmup_steps": warmup}
    made = optimizer()
    options = {} if name == "constant" else {"min_lr_ratio": minimum}
    found = rates(made, build_scheduler(made, **shape, **options), total + 5)
    expected = [closed_form(step, name, total, warmup, minimum) for step in range(total + 5)]
    for values, factor in zip(found, expected, strict=True):
        assert values == pytest.approx([peak * factor for peak in PEAKS], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
@pytest.mark.parametrize(
    ("total", "warmup", "ratio", "decay"),
    [(30, 4, 0.1, 3), (30, 0, 1.0, 30), (30, 15, 0.5, 15), (30, 4, 0.01, 1), (7, 1, 0.3, 2), (1, 0, 0.1, 1)],
)
@pytest.mark.parametrize("minimum", [0.0, 0.1])
def test_every_step_of_warm_up_stable_decay_is_the_closed_form(shape, total, warmup, ratio, decay, minimum) -> None:
    options = {"name": "wsd", "total_steps": total, "warmup_steps": warmup, "min_lr_ratio": minimum}
    found = rates(*start(**options, decay_ratio=ratio, decay_shape=shape), total + 5)
    for step, values in enumerate(found):
        factor = warmup_stable_decay(step, total, warmup, minimum, decay, shape)
        assert values == pytest.approx([peak * factor for peak in PEAKS], rel=1e-12, abs=1e-15), step


def test_warm_up_stable_decay_is_at_its_peak_in_between() -> None:
    found = [values[0] for values in rates(*start(name="wsd", decay_ratio=0.2, min_lr_ratio=0.0), 30)]
    assert [step for step, rate in enumerate(found) if rate == PEAKS[0]] == list(range(4, 25))  # 24: none decayed yet
    assert min(found) > 0


def test_a_decay_that_overlaps_the_warm_up_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"26 steps of warm-up and 6 of decay .* 30 steps"):
        start(name="wsd", warmup_steps=26, decay_ratio=0.2)


def test_the_peak_is_reached_once_and_no_step_of_the_run_is_wasted() -> None:
    found = [values[0] for values in rates(*start(min_lr_ratio=0.0), 30)]
    assert found.index(max(found)) == 4
    assert found.count(PEAKS[0]) == 1
    assert min(found) > 0


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize("stop", [0, 2, 4, 17, 28, 29])
def test_a_resumed_schedule_goes_on_as_if_unbroken(stop, name) -> None:
    unbroken = rates(*start(name=name), 30)
    made, scheduler = start(name=name)
    rates(made, scheduler, stop)
    state = json.loads(json.dumps([made.state_dict(), scheduler.state_dict()]))
    made, scheduler = start(name=name)
    made.load_state_dict(state[0])
    scheduler.load_state_dict(state[1])
    assert rates(made, scheduler, 30 - stop) == unbroken[stop:]


def test_the_state_survives_a_weights_only_checkpoint(tmp_path) -> None:
    _, scheduler = start()
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == scheduler.state_dict()


def test_a_run_resumed_with_more_steps_follows_the_longer_schedule() -> None:
    made, scheduler = start()
    rates(made, scheduler, 10)
    state = scheduler.state_dict()
    longer, schedule = start(total_steps=100)
    schedule.load_state_dict(state)
    rates(longer, schedule, 1)
    assert longer.param_groups[0]["lr"] == pytest.approx(PEAKS[0] * closed_form(11, "cosine", 100, 4, 0.1), rel=1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"warmup_steps": 31}, r"warmup_steps is 31 in a run of 30 steps"),
        ({"warmup_steps": -1}, r"(?s)warmup_steps is -1.*greater than or equal to 0"),
        ({"warmup_ratio": "0.1"}, r"(?s)warmup_ratio is '0.1'.*valid number"),
        ({"min_lr_ratio": 1.5}, r"(?s)min_lr_ratio is 1.5.*less than or equal to 1"),
        ({"min_lr": 0.1}, r"(?s)min_lr is not a key.*did you mean 'min_lr_ratio'"),
    ],
)
def test_wrong_options_are_rejected(wrong, message) -> None:
    with pytest.raises(ConfigError, match=message):
        start(**wrong)


def test_an_unknown_name_is_rejected() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        start(name="cosin")
    with pytest.raises(ConfigError, match=r"(?s)decay_shape is 'sqr'.*'sqrt'"):
        start(name="wsd", decay_shape="sqr")
