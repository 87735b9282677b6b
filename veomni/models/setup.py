"""From a module to the one that is trained: adapted, sharded, with its weights, in the order that is written here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from veomni.compat.collectives import broadcast_all
from veomni.errors import ModelError
from veomni.models import Materializer, derive_plan
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.adapter.passes.documents import isolate_documents
from veomni.models.adapter.passes.media import prepare_towers
from veomni.models.adapter.passes.token_loss import install_token_loss
from veomni.models.build.backends import resolve_attention, resolve_experts
from veomni.models.traits import FusesHead, PassesDocuments, examine_model
from veomni.moe import MoEOptions, RouterScoring, install_controller
from veomni.strategies.base import SetupContext, Strategy
from veomni.strategies.transforms.buffers import SharedBuffers
from veomni.strategies.transforms.precision import ComputePrecision

if TYPE_CHECKING:
    from veomni.launcher import Launcher


def setup_model(
    launcher: Launcher, model: nn.Module, *, fused_loss: bool, router: MoEOptions | None, broadcast_weights: bool
) -> nn.Module:
    """Shard ``model``, give it its weights and return the module to call; see ``Launcher.setup_model``."""
    precision, accelerator, state, device = launcher.precision, launcher.accelerator, launcher.state, launcher.device
    owner = launcher.parameter_strategy
    if not isinstance(model, nn.Module):
        raise ModelError(f"setup_model() was given a {type(model).__name__}", "give it a module, or build_model(...)")
    adapter = ModelAdapter.of(model)
    if adapter.traits is not None:  # passes and hooks would be on it twice
        raise ModelError(f"setup_model() was called with this {type(model).__name__} before", "build another")

    # What the model computes with
    isolate_documents(model)
    varlen = precision.compute is torch.bfloat16 and accelerator.supports_varlen_attention
    resolve_attention(model, device, varlen=varlen, packages=accelerator.flash_packages)
    resolve_experts(model, precision.compute, accelerator.experts_backends)
    _store_in(model, precision.storage)
    _share_values(model)

    # What it must be able to do
    spread = [strategy for strategy in launcher.strategies if {*strategy.mesh_axes().values()} - {1}]
    required = {trait for each in spread for trait in each.requires}
    adapter.traits = examine_model(model, [PassesDocuments, FusesHead, RouterScoring, *required])
    _check_traits(adapter, spread)

    # What it gets its values from, later; and what is added to its forward
    plan = derive_plan(model)
    group = dist.group.WORLD if broadcast_weights else None
    storage = owner.storage_device(device)
    materialize = Materializer(model, device=device, seed=launcher.seed, group=group, storage=storage)
    launcher.reporter.describe_model(model, accelerator, precision, launcher.world_size)
    install_token_loss(model, fused=fused_loss)
    dtype = torch.float64 if precision.name == "fp64" else torch.float32
    controller = install_controller(model, router or MoEOptions(), state, device, dtype)
    prepare_towers(model)

    # Experts, sequence, encoders, recomputation, compilation, precision; then the parameters, materialised and loaded
    context = SetupContext(state, accelerator, device, precision, plan, owner, materialize, launcher.strategies)
    chosen = [each for strategy in launcher.strategies for each in strategy.chosen(adapter, context)]
    transforms = [*chosen, ComputePrecision(), SharedBuffers()]
    for strategy in sorted(transforms, key=lambda each: each.stage):
        strategy.transform(adapter, context)
    ready = owner.parallelize(model, context)

    # What only the real model shows
    adapter.traits.complete(ready, model, device)
    _check_traits(adapter, spread)
    if controller is not None:
        controller.check(ready)
    return ready


def _check_traits(adapter: ModelAdapter, strategies: Sequence[Strategy]) -> None:
    for strategy in strategies:
        adapter.traits.require(*strategy.requires, by=type(strategy).__name__)


def _store_in(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _share_values(model: nn.Module) -> None:
    tensors = [tensor.data for tensor in [*model.parameters(), *model.buffers()] if not tensor.is_meta]
    if dist.get_world_size() > 1:
        assert dist.group.WORLD is not None
        broadcast_all(tensors, dist.group.WORLD)
