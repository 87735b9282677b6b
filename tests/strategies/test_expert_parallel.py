"""Experts on several ranks: weights in and out, what is refused, and what is gathered when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from tests.models.layouts import materialized, same_files
from tests.models.tiny import tiny_config
from veomni.errors import ConfigError, LayoutError, ModelError
from veomni.launcher import Launcher
from veomni.models import build_model
from veomni.models.weights.safetensors_files import SafetensorsFiles
from veomni.strategies import FSDP1, FSDP2, ExpertParallel
from veomni.strategies.fsdp2 import set_prefetch
from veomni.testing.ranks import RankFailed, run_ranks

STRATEGIES = {
    "fsdp2": lambda: [FSDP2(), ExpertParallel(2)],
    "fsdp1": lambda: [FSDP1(), ExpertParallel(2)],
    "hsdp": lambda: [FSDP2(replicate=2), ExpertParallel(2)],
}


def launched(strategy) -> Launcher:
    launcher = Launcher(strategy, accelerator="cpu", precision="fp32", timeout_seconds=60)
    launcher.launch()
    return launcher


def read_and_export(strategy: str, source: Path | None, target: Path) -> dict[str, set[str]]:
    """Load (from files, or take a module that has values), export, and say which expert tensors this rank read."""
    launcher = launched(STRATEGIES[strategy]())
    read: set[str] = set()
    read_file = SafetensorsFiles.read

    def remember(self, name, *args):
        read.add(name)
        return read_file(self, name, *args)

    SafetensorsFiles.read = remember
    model = materialized(tiny_config("qwen3_moe")) if source is None else build_model(source)
    model = launcher.setup_model(model)
    seen = {name for name in read if ".experts." in name}
    launcher.export(model, target)
    place = {"rank": launcher.rank, "ep": launcher.state.rank("ep"), "read": seen}
    launcher.close()
    return place


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_each_rank_reads_its_own_experts_and_the_export_is_the_checkpoint(strategy, ranks, tmp_path):
    materialized(tiny_config("qwen3_moe")).save_pretrained(tmp_path / "source")
    if strategy == "hsdp" and ranks == 2:
        return
    for place in run_ranks(read_and_export, ranks, strategy, tmp_path / "source", tmp_path / "hf", init=False):
        numbers = {int(name.split(".experts.")[1].split(".")[0]) for name in place["read"]}
        assert numbers == ({0, 1} if place["ep"] == 0 else {2, 3})
    assert same_files(tmp_path / "source", tmp_path / "hf")


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp1"])
def test_a_module_that_has_values_keeps_them(strategy, tmp_path):
    materialized(tiny_config("qwen3_moe")).save_pretrained(tmp_path / "source")
    run_ranks(read_and_export, 4, strategy, None, tmp_path / "hf", init=False)
    assert same_files(tmp_path / "source", tmp_path / "hf")


def placements() -> dict[str, tuple]:
    launcher = launched([FSDP2(), ExpertParallel(2)])
    model = launcher.setup_model(build_model(tiny_config("gpt_oss"), weights="random"))
    found = {
        name: (parameter.placements, parameter.device_mesh.mesh_dim_names, tuple(parameter.to_local().shape))
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor) and ".experts." in name
    }
    launcher.close()
    return found


def test_experts_are_sharded_over_ep_and_each_expert_over_ep_fsdp():
    for found in run_ranks(placements, 4, init=False):
        assert len(found) == 8
        for name, (placement, axes, shape) in found.items():
            assert placement == (Shard(1), Shard(0)), name
            assert axes == ("ep_fsdp", "ep")
            assert shape[0] == 2


def gathering_order() -> tuple[list[str], list[str]]:
    """The units in the order in which the first of a step starts gathering them."""
    launcher = launched([FSDP2(), ExpertParallel(2)])
    model = launcher.setup_model(build_model(tiny_config("qwen3_moe"), weights="random"))
    names = {id(module): name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    chains = []
    for kind in ("_states_to_forward_prefetch", "_states_to_backward_prefetch"):
        states = {id(module._get_fsdp_state()): names[id(module)] for module in model.modules() if id(module) in names}
        chain = {
            names[id(module)]: [states[id(state)] for state in getattr(module._get_fsdp_state(), kind)]
            for module in model.modules()
            if id(module) in names
        }
        chains.append(chain)
    launcher.close()
    return chains


def test_the_next_unit_is_gathered_while_this_one_computes():
    layer = "model.layers.{}".format
    experts = "model.layers.{}.mlp.experts".format
    for forward, backward in run_ranks(gathering_order, 2, init=False):
        assert forward[layer(0)] == [experts(0)]
        assert forward[experts(0)] == [layer(1)]
        assert forward[layer(1)] == [experts(1)]
        assert backward[layer(1)] == [experts(1)]
        assert backward[experts(1)] == [layer(0)]
        assert backward[layer(0)] == [experts(0)]


def test_prefetching_nothing_touches_no_unit():
    set_prefetch([torch.nn.Linear(1, 1)], 0)


# ---------------------------------------------------------------- refused

REFUSED = {
    "a dense model": ("llama", {}, 2, "has no experts", "leave expert parallelism out"),
    "experts that do not divide": ("qwen3_moe", {"num_experts": 3}, 2, "the 3 experts of", "use one of 1, 3"),
    "sizes that do not divide": ("qwen3_moe", {"moe_intermediate_size": 3, "hidden_size": 33, "head_dim": 8}, 2,
                                 "no dimension of experts", "larger expert parallel size"),
}  # fmt: skip


def refused(model: str, changes: dict) -> None:
    launched([FSDP2(), ExpertParallel(2)]).setup_model(build_model(tiny_config(model, **changes), weights="random"))


@pytest.mark.parametrize("case", list(REFUSED))
def test_models_that_cannot_be_split_are_rejected(case):
    model, changes, ranks, problem, fix = REFUSED[case]
    with pytest.raises(RankFailed) as caught:
        run_ranks(refused, 2 * ranks, model, changes, init=False)
    error = caught.value.exceptions[0]
    assert isinstance(error, ModelError)
    assert problem in error.problem
    assert fix in error.fix


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": 2, "chunks": 0}, "chunks is 0"),
        ({"size": 2, "exchange": "some"}, "exchange is 'some'"),
        ({"size": 2, "placement": "far"}, "placement is 'far'"),
    ],
)
def test_options_are_checked_when_they_are_given(options, problem):
    with pytest.raises(ConfigError, match=f"ExpertParallel.{problem}"):
        ExpertParallel(**options)


def test_a_world_that_does_not_divide_is_rejected_before_any_process():
    with pytest.raises(LayoutError, match="expert parallel size 4 does not divide the 2 ranks"):
        Launcher([FSDP2(), ExpertParallel(4)], accelerator="cpu", devices=2).launch()
