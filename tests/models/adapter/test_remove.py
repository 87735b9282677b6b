"""What the adapter takes off is gone: state dict, hooks, attributes and outputs are those of a model never set up."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from tests.models.multimodal import family_config
from tests.models.tiny import tiny_config
from veomni.launcher import Launcher
from veomni.models import build_model, derive_plan
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.transformers_api.capabilities import set_config_flag
from veomni.models.transformers_api.construction import construct
from veomni.models.weights.export import full_tensors
from veomni.strategies import DDP, FSDP2, Float8, Single, Ulysses
from veomni.testing.ranks import run_ranks

MODELS = {"qwen3": tiny_config, "qwen3_moe": tiny_config, "qwen3_vl": family_config}
PRECISION = {"qwen3_moe": "fp32"}  # transformers' own experts take no float64
LAYOUTS: dict[str, tuple[int, Any]] = {
    "single": (1, lambda: [Single()]),
    "ddp": (2, lambda: [DDP()]),
    "fsdp2_ulysses2": (2, lambda: [FSDP2(), Ulysses(2)]),
    "fsdp2_float8": (2, lambda: [FSDP2(), Float8(emulate=True)]),
}
IDS = torch.arange(3, 19)[None]


def ready(name: str, layout: str) -> tuple[Launcher, nn.Module]:
    precision = "fp32" if "float8" in layout else PRECISION.get(name, "fp64")
    launcher = Launcher(
        LAYOUTS[layout][1](), accelerator="cpu", backend="gloo", precision=precision, timeout_seconds=60
    )
    launcher.launch()
    return launcher, launcher.setup_model(build_model(MODELS[name](name), weights="random"))


def attributes(model: nn.Module) -> dict[str, Any]:
    """Return what every module has beside tensors and children: hooks are counted, configurations compared whole."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            # transformers marks what it has initialised, and FSDP2 what it manages: neither is the adapter's.
            if key in ("_parameters", "_buffers", "_modules", "_is_hf_initialized") or "composable_api" in key:
                continue
            if "_hooks" in key and hasattr(value, "__len__"):
                value = len(value)
            found[f"{name}.{key}"] = value.to_dict() if hasattr(value, "to_dict") else value
    return found


def differs(found: Any, expected: Any) -> bool:
    return bool(found != expected) and (repr(found) != repr(expected) or " at 0x" in repr(found))


def fresh_like(plain: nn.Module, launcher: Launcher, name: str) -> nn.Module:
    """Return a model that was never set up, with the same values; sharded by torch alone where ``plain`` is sharded."""
    values = dict(full_tensors(plain))
    config = MODELS[name](name)
    config.architectures, config.use_cache = plain.config.architectures, False
    cls = type(plain).__bases__[1] if isinstance(plain, FSDPModule) else type(plain)
    fresh = construct(cls, config, "sdpa").to(launcher.precision.storage)
    set_config_flag(fresh.config, "use_cache", False)
    fresh.load_state_dict({key: values[key] for key in fresh.state_dict() if key in values}, strict=False)
    fresh.tie_weights()
    if isinstance(plain, FSDPModule):
        plan = derive_plan(fresh)
        for unit in (*plan.embeddings, *plan.heads, *plan.blocks):
            fully_shard(fresh.get_submodule(unit), mesh=launcher.state.parameter_mesh)
        fully_shard(fresh, mesh=launcher.state.parameter_mesh)
    return fresh.train(plain.training)


def removed_is_plain(name: str, layout: str) -> None:
    launcher, model = ready(name, layout)
    plain = ModelAdapter.of(model).remove()
    fresh = fresh_like(plain, launcher, name)
    same_output(plain, fresh)  # first: FSDP2 registers hooks of its own in a first forward
    expected, found = attributes(fresh), attributes(plain)
    assert {key: found[key] for key in found if differs(found[key], expected.get(key, "none"))} == {}
    assert expected.keys() == found.keys()
    assert [key for key, _ in plain.named_parameters()] == [key for key, _ in fresh.named_parameters()]
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert plain.state_dict().keys() == fresh.state_dict().keys()
    launcher.close()


@torch.no_grad()
def same_output(plain: nn.Module, fresh: nn.Module) -> None:
    inputs = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    mine, truth = plain(**inputs), fresh(**deepcopy(inputs))
    assert isinstance(mine.logits, Tensor)
    assert torch.equal(mine.logits, truth.logits)
    assert torch.equal(mine.loss, truth.loss)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_remove_gives_back_the_plain_model(name: str, layout: str) -> None:
    run_ranks(partial(removed_is_plain, name, layout), LAYOUTS[layout][0], init=False)


def root_hooks(name: str, layout: str) -> list[int]:
    launcher, model = ready(name, layout)
    own = [
        [hook for hook in hooks.values() if "veomni" in getattr(hook, "__module__", "")]
        for hooks in (model._forward_pre_hooks, model._forward_hooks)
    ]
    launcher.close()
    return [len(hooks) for hooks in own]


def test_the_root_of_a_vision_language_model_under_fsdp2_and_ulysses_has_two_hooks() -> None:
    assert run_ranks(partial(root_hooks, "qwen3_vl", "fsdp2_ulysses2"), 2, init=False) == [[1, 1]] * 2
