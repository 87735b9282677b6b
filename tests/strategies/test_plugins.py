from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.models.tiny import tiny_config
from veomni.errors import ConfigError, LayoutError
from veomni.strategies import DDP, FSDP1, FSDP2, ExpertParallel, ParameterStrategy, Single, Strategy
from veomni.strategies.select import parameter_strategy, select_strategies
from veomni.testing.step import prove

PLUGIN = Path(__file__).parents[1] / "plugin"


@pytest.fixture
def installed_plugin(monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGIN))
    yield
    sys.modules.pop("veomni_flat_allreduce", None)


@pytest.mark.usefixtures("installed_plugin")
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_third_party_strategy_is_found_by_name_and_is_exact(accumulation):
    prove(tiny_config("llama"), lambda: "flat_allreduce", 2, accumulation=accumulation)


@pytest.mark.usefixtures("installed_plugin")
def test_a_third_party_strategy_composes_with_expert_parallelism():
    prove(tiny_config("qwen3_moe"), lambda: [*select_strategies("flat_allreduce"), ExpertParallel(2)], 2)


@pytest.mark.parametrize(("name", "expected"), [("single", Single), ("ddp", DDP), ("fsdp1", FSDP1), ("fsdp2", FSDP2)])
def test_built_in_strategies_come_the_same_way(name, expected):
    (found,) = select_strategies(name)
    assert type(found) is expected


def test_unknown_strategy_suggests_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'fsdp2'"):
        select_strategies("fsdp22")


class Spectator(Strategy):
    name = "spectator"


@pytest.mark.parametrize("choice", [[Spectator()], [Single(), DDP()], []])
def test_exactly_one_strategy_holds_the_parameters(choice):
    with pytest.raises(LayoutError, match="exactly one strategy must hold the parameters"):
        parameter_strategy(select_strategies(choice))


def test_others_may_stand_beside_it():
    owner = FSDP2()
    assert parameter_strategy(select_strategies([Spectator(), owner])) is owner
    assert isinstance(owner, ParameterStrategy)


def test_single_refuses_several_ranks():
    with pytest.raises(LayoutError, match="strategy single was given 2 ranks"):
        Single().check(2)


def test_fsdp1_refuses_unknown_sharding():
    with pytest.raises(ConfigError, match=r"FSDP1\.sharding is 'zero9'"):
        FSDP1(sharding="zero9")
