"""Fully sharded data parallel, second generation: every parameter a DTensor, no wrapper around the model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from typing_extensions import override

from veomni.config.section import Validated
from veomni.models.adapter.adapter import ModelAdapter
from veomni.strategies.base import ParameterStrategy, SetupContext, set_up_as
from veomni.strategies.grad_norm import sharded_grad_norm
from veomni.strategies.units import ShardedUnits, cast_policy


@dataclass(eq=False, kw_only=True)
class FSDP2(Validated, ParameterStrategy):
    """Shard parameters, gradients and optimizer state with ``fully_shard``.

    Blocks, and an embedding and a head with weights of their own, are gathered when they are used; the rest is gathered
    for the whole forward and backward.

    Args:
        replicate: Number of replicas of the sharded model; more than 1 is HSDP.
        reshard_after_forward: Free a block's gathered parameters after its forward and gather them again for the
            backward.
        reshard_after_backward: Free them between the micro-batches of an accumulated step.
        cpu_offload: Keep parameters, gradients and optimizer state in host memory.
        prefetch: Units (blocks, experts inside them, the head) whose gathering is started ahead in the forward and the
            backward; 0 leaves it to PyTorch, which gathers one ahead where nothing synchronises with the host. Experts
            on several ranks do synchronise: with them, 0 is 1.
    """

    name = "fsdp2"
    casts_parameters = True

    replicate: Annotated[int, Ge(1)] = 1
    reshard_after_forward: bool = True
    reshard_after_backward: bool = True
    cpu_offload: bool = False
    prefetch: Annotated[int, Ge(0)] = 0

    @override
    def mesh_axes(self) -> Mapping[str, int]:
        return {"dp_replicate": self.replicate, "dp_shard": -1}

    @override
    def parallelize(self, model: nn.Module, context: SetupContext) -> nn.Module:
        self._device, mesh, units = context.device, context.state.parameter_mesh, ShardedUnits(context)
        for name in context.plan.keep_fp32 if context.precision.mixed else ():
            # Modeling code that keeps a module in float32 casts that module's inputs itself.
            fp32 = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
            units.add(model.get_submodule(name), mesh, fp32, reshard=False)
        policy, plan = cast_policy(context.precision), context.plan
        reshard = self.reshard_after_forward and context.state.size("fsdp") > 1  # unsharded ones would free nothing
        blocks = [model.get_submodule(name) for name in plan.blocks]
        heads = [model.get_submodule(name) for name in plan.heads]
        for name in plan.embeddings:
            units.add_embedding(model.get_submodule(name), mesh, policy, reshard=reshard)
        for head in heads:
            units.add_head(head, mesh, policy)
        for module in [*blocks, model]:
            # The backward starts with the last block, so its parameters stay. So do those outside of all units.
            stays = module in [*blocks[-1:], model]
            units.add(module, mesh, policy, reshard=reshard and not stays)
        set_prefetch([*blocks, *heads], max(self.prefetch, 1 if context.placed else 0))
        ModelAdapter.of(model).add(units)
        context.materialize(model, "")
        return model

    @override
    @contextmanager
    def grad_sync(self, model: nn.Module, last: bool) -> Iterator[None]:
        sharded = set_up_as(FSDPModule, model)
        if last:  # so it is outside of steps as well, and setting it visits every module
            yield
            return
        self._set_last(sharded, False)
        try:
            yield
        finally:
            self._set_last(sharded, True)

    def _set_last(self, model: FSDPModule, last: bool) -> None:
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        if not self.reshard_after_backward:
            model.set_reshard_after_backward(last)

    @override
    def grad_norm(self, model: nn.Module) -> Tensor:
        set_up_as(FSDPModule, model)
        return sharded_grad_norm(model.parameters(), self._device)


def set_prefetch(blocks: Sequence[nn.Module], depth: int) -> None:
    """Start gathering each unit ``depth`` units early: a block's attention, then its experts, then the next block."""
    if not depth:
        return
    parts = [[module for module in block.modules() if isinstance(module, FSDPModule)] for block in blocks]
    forward: list[FSDPModule] = [unit for units in parts for unit in units]
    backward: list[FSDPModule] = [unit for units in reversed(parts) for unit in units[:1] + units[:0:-1]]
    for index, unit in enumerate(forward):
        unit.set_modules_to_forward_prefetch(forward[index + 1 : index + 1 + depth])
    for index, unit in enumerate(backward):
        unit.set_modules_to_backward_prefetch(backward[index + 1 : index + 1 + depth])
