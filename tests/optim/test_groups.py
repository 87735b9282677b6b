"""Who is decayed, in every layout."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tests.models.tiny import tiny_config
from veomni.errors import ConfigError, ModelError
from veomni.optim import build_optimizer_groups
from veomni.testing.ranks import run_ranks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 6)
        self.gate_bias = nn.Parameter(torch.zeros(2, 3))
        self.scale = nn.Parameter(torch.ones(5))
        self.experts = nn.Parameter(torch.ones(4, 6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.input_norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight


DECAYED = ["embed.weight", *(f"layers.{i}.{name}" for i in (0, 1) for name in ("linear.weight", "experts"))]


def split(model: nn.Module, no_decay: Any = ()) -> tuple[set[str], set[str]]:
    """Names in the group with weight decay and in the one without."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[float, set[str]] = {0.1: set(), 0.0: set()}
    listed = 0
    for group in build_optimizer_groups(model, weight_decay=0.1, no_decay=no_decay):
        found[group["weight_decay"]] = {names[id(parameter)] for parameter in group["params"]}
        listed += len(group["params"])
    assert listed == len(found[0.1]) + len(found[0.0])  # none twice
    return found[0.1], found[0.0]


def everyone(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def test_matrices_are_decayed_vectors_and_biases_are_not() -> None:
    decayed, kept = split(model := Model())
    assert sorted(decayed) == sorted(DECAYED)
    assert decayed | kept == everyone(model)


@pytest.mark.parametrize(
    ("patterns", "exempt"),
    [
        (["embed"], {"embed.weight"}),
        (["head.weight"], {"embed.weight"}),  # the other name of a tied parameter
        (["*.experts"], {"layers.0.experts", "layers.1.experts"}),
        (["layers.1", "embed.*"], {"layers.1.linear.weight", "layers.1.experts", "embed.weight"}),
    ],
)
def test_patterns_exempt_more(patterns, exempt) -> None:
    decayed, kept = split(Model(), patterns)
    assert decayed == set(DECAYED) - exempt
    assert exempt <= kept


def test_a_pattern_that_matches_nothing_is_rejected_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"(?s)no_decay: no parameter matches 'embd\.weight'.*'embed\.weight'"):
        split(Model(), ["embd.weight"])


def test_the_defaults_of_the_configuration_fit_a_model_without_biases() -> None:
    decayed, _ = split(nn.Linear(3, 3, bias=False), ["*norm*", "*.bias"])
    assert decayed == {"weight"}


def test_frozen_parameters_are_in_no_group() -> None:
    model = Model()
    model.layers[0].requires_grad_(False)
    decayed, kept = split(model, ["layers.0.linear"])
    assert decayed | kept == {name for name in everyone(model) if not name.startswith("layers.0.")}
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="frozen"):
        split(model)


def test_empty_groups_are_left_out() -> None:
    assert len(build_optimizer_groups(nn.Linear(2, 2, bias=False), weight_decay=0.1, no_decay=())) == 1


def test_a_real_mixture_of_experts() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("gpt_oss"))
    decayed, kept = split(model)
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.router.weight"} <= decayed
    assert {
        "model.layers.0.mlp.experts.gate_up_proj_bias",
        "model.layers.0.self_attn.sinks",
        "model.norm.weight",
    } <= kept


def in_layout(layout: str, no_decay: list[str]) -> tuple[list[str], list[str]]:
    model: nn.Module = Model()
    if layout == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif layout == "fsdp1":
        wrap = functools.partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
        model = wrap(model, auto_wrap_policy=ModuleWrapPolicy({Block}))
    elif layout == "fsdp2":
        for block in model.layers:  # type: ignore[attr-defined]
            fully_shard(block)
        fully_shard(model)
    assert dist.get_world_size() == 2
    groups = split(model, no_decay)
    wrappers = ("_fsdp_wrapped_module.", "module.")
    clean = [
        sorted(functools.reduce(lambda n, w: n.replace(w, ""), wrappers, name) for name in names) for names in groups
    ]
    return clean[0], clean[1]


@pytest.mark.parametrize("layout", ["ddp", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("no_decay", [[], ["head.weight", "layers.0.experts"]])
def test_every_layout_splits_alike(layout, no_decay) -> None:
    decayed, kept = split(Model(), no_decay)
    for found in run_ranks(in_layout, 2, layout, no_decay):
        assert found == (sorted(decayed), sorted(kept))
