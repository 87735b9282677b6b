"""Random weights: the same in every layout, distributed as transformers', with buffers as a normal construction's."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
import transformers
from torch import nn

from tests.models.any_tiny import any_tiny_config
from tests.models.layouts import CPU, fsdp1, fsdp2, materialized
from tests.models.tiny import OTHER_MODELS, TEXT_MODELS, tiny_config
from veomni.errors import ModelError
from veomni.launcher import Launcher
from veomni.models import Materializer, build_model
from veomni.models.build.constructor import constructor_values
from veomni.models.weights.export import full_tensors
from veomni.testing.ranks import RankFailed, run_ranks


def normally(config: transformers.PreTrainedConfig, like: nn.Module) -> nn.Module:
    """The model as transformers itself constructs and initialises it, without the meta device."""
    torch.manual_seed(0)
    return like.__class__._from_config(config, attn_implementation=like.config._attn_implementation)


CONSTRUCTED = {name: any_tiny_config(name) for name in ("apertus", "openai-gpt", "diffllama")}
"""Models with values that only a constructor sets: learned activations, GPT's projections, draws of torch.normal."""


def config_of(name: str) -> transformers.PreTrainedConfig:
    return deepcopy(CONSTRUCTED[name]) if name in CONSTRUCTED else tiny_config(name)


@pytest.mark.parametrize("name", [*TEXT_MODELS, *OTHER_MODELS, *CONSTRUCTED])
def test_buffers_equal_those_of_a_normal_construction(name):
    model = materialized(config_of(name))
    expected = dict(normally(config_of(name), model).named_buffers())
    buffers = dict(model.named_buffers())
    assert buffers.keys() == expected.keys()
    for key, buffer in buffers.items():
        assert buffer.dtype is expected[key].dtype, key
        assert torch.equal(buffer, expected[key]), key


@pytest.mark.parametrize("name", [*TEXT_MODELS, *OTHER_MODELS, *CONSTRUCTED])
def test_parameters_are_distributed_as_transformers_distributes_them(name):
    model = materialized(config_of(name))
    reference = normally(config_of(name), model)
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()
    for key, parameter in ours.items():
        count = parameter.numel()
        spread, expected = float(parameter.detach().std(correction=0)), float(theirs[key].detach().std(correction=0))
        assert (spread == 0) == (expected == 0), key
        if expected == 0:
            assert torch.equal(parameter, theirs[key]), key
        elif count >= 64:  # two sample deviations differ by about 1 / sqrt(count)
            assert abs(spread / expected - 1) < 6 / count**0.5, key
            offset = float(parameter.detach().mean() - theirs[key].detach().mean())
            assert abs(offset) < 7 * expected / count**0.5, key


def _full(layout, source, **options):
    return {name: tensor.clone() for name, tensor in full_tensors(layout(source, **options))}


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "gpt2", *CONSTRUCTED])
@pytest.mark.parametrize(("ranks", "options"), [(2, {}), (4, {}), (4, {"replicate": 2})])
def test_every_layout_starts_from_the_same_weights(name, ranks, options):
    alone = dict(full_tensors(materialized(config_of(name))))
    for tensors in run_ranks(_full, ranks, fsdp2, config_of(name), **options):
        assert tensors.keys() == alone.keys()
        assert all(torch.equal(tensors[key], alone[key]) for key in alone)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_fsdp1_starts_from_the_same_weights(name):
    alone = dict(full_tensors(materialized(tiny_config(name))))
    sharded = run_ranks(_full, 2, fsdp1, tiny_config(name))[0]
    assert sharded.keys() == alone.keys()
    assert all(torch.equal(sharded[key], alone[key]) for key in alone)


def test_float64_starts_from_the_float32_numbers():
    alone = dict(full_tensors(materialized(tiny_config("llama"))))
    double = run_ranks(_full, 2, fsdp2, tiny_config("llama"), dtype=torch.float64)[0]
    for key, tensor in double.items():
        assert tensor.dtype is (torch.float64 if "inv_freq" not in key else torch.float32)
        assert torch.equal(tensor, alone[key].to(tensor.dtype))


def test_seeds_and_modules_have_streams_of_their_own():
    first, second, again = (dict(full_tensors(materialized(tiny_config("llama"), seed=s))) for s in (1, 2, 1))
    key, other = "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.gate_proj.weight"
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], second[key])
    assert not torch.equal(first[key], first[other])


def test_parameters_of_one_module_do_not_share_their_numbers():
    experts = materialized(tiny_config("gpt_oss")).model.layers[0].mlp.experts
    first, second = (p.detach().flatten()[:500] for p in (experts.gate_up_proj, experts.down_proj))
    assert not torch.isin(first, second).any()


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_what_only_a_constructor_sets_follows_the_seed(name):
    first, second, again = (dict(full_tensors(materialized(config_of(name), seed=s))) for s in (1, 2, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_a_built_model_is_on_the_meta_device_alone(name):
    model = build_model(config_of(name), weights="random")
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_constructing_again_keeps_only_what_is_asked_for():
    model = build_model(config_of("apertus"), weights="random")
    name = "model.layers.0.mlp.act_fn.alpha_p"
    values = constructor_values(model, [name])
    assert values.keys() == {name}
    assert float(values[name]) == pytest.approx(math.log(math.expm1(0.8)), rel=1e-2)  # xIELU's own, in bfloat16


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    materialized(tiny_config("llama"))
    assert torch.equal(torch.rand(3), expected)


def test_initialisers_that_reach_into_children_run_after_them():
    # GPT-2 scales its residual projections from the block: by 1 / sqrt(2 * layers), here 1/2 * 0.5
    model = materialized(tiny_config("gpt2", n_layer=8, initializer_range=0.5))
    block = model.transformer.h[3]
    assert float(block.mlp.c_proj.weight.detach().std()) == pytest.approx(0.125, rel=0.1)
    assert float(block.mlp.c_fc.weight.detach().std()) == pytest.approx(0.5, rel=0.1)


def test_tied_parameters_stay_tied():
    model = materialized(tiny_config("qwen3"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


class _Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.MultiheadAttention(8, 2))
        self.head = nn.Linear(8, 4, bias=False)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def reset_parameters(self):
        nn.init.constant_(self.frozen, 2.0)


def test_plain_modules_are_reset():
    with torch.device("meta"):
        model = _Plain()
    Materializer(model, device=CPU, seed=0)(model)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert torch.equal(model.frozen, torch.full((3,), 2.0))
    assert model.frozen.requires_grad is False
    assert torch.equal(model.body[1].weight, torch.ones(8))
    assert 0 < model.body[0].weight.abs().max() <= 0.5  # Linear: uniform within 1 / sqrt(4)
    assert model.body[2].in_proj_weight.std() > 0


def test_values_that_are_there_stay():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].to("meta")
    with torch.device("meta"):
        model[1] = nn.Linear(2, 2)
    before = model[0].weight.clone()
    Materializer(model, device=CPU, seed=0)(model)
    assert torch.equal(model[0].weight, before)
    assert not model[1].weight.is_meta


class _Forgotten(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(2))


class _Loose(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.table = torch.zeros(2)


@pytest.mark.parametrize(("cls", "name"), [(_Forgotten, "scale"), (_Loose, "table")])
def test_what_nothing_initialises_is_named(cls, name):
    with torch.device("meta"):
        model = cls()
    with pytest.raises(ModelError, match=name):
        Materializer(model, device=CPU, seed=0)(model)


def _build_after_sharding():
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = fully_shard(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="already sharded"):
        Materializer(model, device=CPU, seed=0)


def test_a_sharded_model_is_rejected():
    run_ranks(_build_after_sharding, 1)


class Stack(transformers.PreTrainedModel):
    """A transformers model of one's own, with experts that nothing initialises."""

    config_class = transformers.LlamaConfig

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        self.router = nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.empty(4, 8, 8))
        self.scale = nn.Parameter(torch.full((8,), 0.5))
        self.post_init()


def set_up_stack(strategy: str) -> None:
    launcher = Launcher(strategy, accelerator="cpu", backend="gloo", timeout_seconds=60)
    launcher.launch()
    with torch.device("meta"):
        model = Stack(transformers.LlamaConfig())
    launcher.setup_model(model)


@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("fsdp2", 2)])
def test_memory_that_nothing_initialises_is_rejected_by_name(strategy, ranks):
    with pytest.raises(RankFailed) as caught:
        run_ranks(set_up_stack, ranks, strategy, init=False)
    assert caught.value.exceptions.keys() == set(range(ranks))
    for error in caught.value.exceptions.values():
        assert isinstance(error, ModelError)
        assert error.problem.startswith("nothing initialises experts:")
    assert not torch.are_deterministic_algorithms_enabled()
