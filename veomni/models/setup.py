"""From a module to the one that is trained: adapted, sharded, with its weights, in the order that is written here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from veomni.models import (
    Materializer,
    derive_plan,
    install_token_loss,
    isolate_documents,
    prepare_towers,
    resolve_attention,
    resolve_experts,
    unwrap,
)
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.adapter.passes.documents import remember_leak
from veomni.models.traits import PassesDocuments, complete, examine_model
from veomni.moe import MoEOptions, install_controller
from veomni.strategies.base import SetupContext
from veomni.strategies.transforms.activation_checkpointing import apply_recompute
from veomni.strategies.transforms.compile import compile_blocks
from veomni.strategies.transforms.encoder_balance import balance_towers

if TYPE_CHECKING:
    from veomni.launcher import Launcher

_BUCKET_BYTES = 250 * 1024**2  # DDP's own at the start


def setup_model(
    launcher: Launcher, model: nn.Module, *, fused_loss: bool, router: MoEOptions | None, broadcast_weights: bool
) -> nn.Module:
    """Shard ``model``, give it its weights and return the module to call; see ``Launcher.setup_model``."""
    precision, accelerator, state = launcher.precision, launcher.accelerator, launcher.state
    half = precision.compute is torch.bfloat16
    isolate_documents(model)
    resolve_attention(model, varlen=half and accelerator.supports_varlen_attention)
    resolve_experts(model, precision, accelerator.experts_backends)
    _store_in(model, precision.storage)
    _share_values(model)
    spread = [strategy for strategy in launcher.strategies if {*strategy.mesh_axes().values()} - {1}]
    traits = examine_model(model, [PassesDocuments, *(trait for each in spread for trait in each.requires)])
    for strategy in spread:
        traits.require(*strategy.requires, by=type(strategy).__name__)
    plan = derive_plan(model)
    offloaded = getattr(launcher.parameter_strategy, "cpu_offload", False)
    storage = torch.device("cpu") if offloaded else launcher.device
    group = dist.group.WORLD if broadcast_weights else None
    materialize = Materializer(model, device=storage, seed=launcher.seed, group=group)
    launcher.reporter.describe_model(model, accelerator, precision, launcher.world_size)
    token_loss = install_token_loss(model, fused=fused_loss)
    dtype = torch.float64 if precision.name == "fp64" else torch.float32
    controller = install_controller(model, router or MoEOptions(), state, launcher.device, dtype)
    prepare_towers(model)
    for strategy in launcher.strategies:
        strategy.prepare(model, plan, state)
    if launcher.balance_towers:
        balance_towers(model, state.group("loss"))
    apply_recompute(model, plan, launcher.recompute)
    if launcher.compile:
        compile_blocks(model, plan, precision)
    context = SetupContext(state, accelerator, launcher.device, precision, plan, materialize)
    ready = launcher.parameter_strategy.parallelize(model, context)
    traits = complete(traits, ready, unwrap(ready), launcher.device)
    for strategy in spread:
        traits.require(*strategy.requires, by=type(strategy).__name__)
    remember_leak(unwrap(ready), traits[PassesDocuments].reason if not traits[PassesDocuments].ok else None)
    for strategy in launcher.strategies:
        strategy.verify(ready, unwrap(ready), context)
    controller.check(ready)
    adapter = ModelAdapter.of(ready)
    adapter.loss, adapter.routers = token_loss, controller
    return ready


def _store_in(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _share_values(model: nn.Module) -> None:
    tensors = [tensor.data for tensor in [*model.parameters(), *model.buffers()] if not tensor.is_meta]
    # Sent in buckets of one dtype and device, as DDP sends its own: a message per tensor costs its latency.
    if tensors and dist.get_world_size() > 1:
        assert dist.group.WORLD is not None
        dist._broadcast_coalesced(dist.group.WORLD, tensors, _BUCKET_BYTES, 0)  # type: ignore[attr-defined]
