"""torchrun's variables: a whole set is joined, anything else is refused by name."""

from __future__ import annotations

import os

import pytest

from tests.launch.conftest import SETTERS
from veomni.errors import LaunchError
from veomni.launch import Environment, detect_environment, join_or_start

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "MASTER_ADDR": "host", "MASTER_PORT": "29500",
}  # fmt: skip


def test_a_process_started_by_hand_has_no_environment() -> None:
    assert detect_environment({}) is None
    assert detect_environment({"MASTER_ADDR": "host", "MASTER_PORT": "1", "RANK": ""}) is None


def test_torchrun_is_read_whole() -> None:
    assert detect_environment(TORCHRUN) == Environment(5, 1, 8, 4, 1, "host", 29500, "torchrun")
    without_group = {name: value for name, value in TORCHRUN.items() if name != "GROUP_RANK"}
    assert detect_environment(without_group) == detect_environment(TORCHRUN)


def test_our_own_children_are_known() -> None:
    found = detect_environment({**TORCHRUN, "VEOMNI_SUPERVISOR_PID": "1"})
    assert found is not None
    assert found.kind == "child"


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_set_names_what_is_missing(missing: str) -> None:
    with pytest.raises(LaunchError, match=rf"not {missing}\n"):
        detect_environment({name: value for name, value in TORCHRUN.items() if name != missing})


def test_several_nodes_need_the_local_world_size() -> None:
    one_node = {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": ""}
    found = detect_environment(one_node)
    assert found is not None
    assert found.local_world_size == 2
    with pytest.raises(LaunchError, match="LOCAL_WORLD_SIZE"):
        detect_environment({**TORCHRUN, "LOCAL_WORLD_SIZE": ""})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "8"), ("RANK", "-1"), ("RANK", "one"), ("RANK", "1.0"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "zwei"),
        ("LOCAL_RANK", "4"), ("LOCAL_WORLD_SIZE", "9"), ("LOCAL_WORLD_SIZE", "x"), ("MASTER_PORT", "http"),
        ("GROUP_RANK", "?"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_rejected_by_name(name: str, value: str) -> None:
    with pytest.raises(LaunchError, match=r"RANK|SIZE|PORT") as caught:
        detect_environment({**TORCHRUN, name: value})
    assert value in caught.value.problem
    assert caught.value.exit_code == 78


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("joined")
def test_joining_agrees_with_the_devices_asked_for() -> None:
    assert join_or_start(4) == join_or_start(None) == detect_environment(TORCHRUN)
    with pytest.raises(LaunchError, match=r"devices is 8 but 4 torchrun processes"):
        join_or_start(8)
    with pytest.raises(LaunchError, match=r"devices is 1"):
        join_or_start(1)


def test_one_device_started_by_hand_is_rank_zero_and_leaves_the_environment_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in SETTERS:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    for devices in (None, 1):
        found = join_or_start(devices)
        assert (found.rank, found.world_size, found.local_world_size, found.kind) == (0, 1, 1, "single")
    assert dict(os.environ) == before


@pytest.mark.parametrize("devices", [0, -2])
def test_fewer_devices_than_one_are_rejected(devices: int) -> None:
    with pytest.raises(LaunchError, match=str(devices)):
        join_or_start(devices)
