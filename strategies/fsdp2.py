"""Fully sharded data parallel, second generation: every parameter a DTensor, no wrapper around the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from typing_extensions import override

from veomni.compat.inplace_reduce_scatter import reduce_in_place
from veomni.models.adapter.adapter import ModelAdapter
from veomni.strategies.base import ParameterStrategy, SetupContext, set_up_as
from veomni.strategies.grad_norm import sharded_grad_norm
from veomni.strategies.transforms.gathered import FreeWithoutBackward


class FSDP2(ParameterStrategy):
    """Shard parameters, gradients and optimizer state with ``fully_shard``.

    Args:
        replicate: Number of replicas of the sharded model; more than 1 is HSDP.
        reshard_after_forward: Free a block's gathered parameters after its forward and gather them again for the
            backward.
        reshard_after_backward: Free them between the micro-batches of an accumulated step.
        cpu_offload: Keep parameters, gradients and optimizer state in host memory.
        prefetch: Units (blocks, and the experts inside them) whose gathering is started ahead in the forward and the
            backward; 0 leaves it to PyTorch, which gathers one ahead where nothing synchronises with the host. Experts
            on several ranks do synchronise: with them, 0 is 1.
    """

    name = "fsdp2"
    casts_parameters = True

    def __init__(
        self,
        *,
        replicate: int = 1,
        reshard_after_forward: bool = True,
        reshard_after_backward: bool = True,
        cpu_offload: bool = False,
        prefetch: int = 0,
    ) -> None:
        self.replicate = replicate
        self.reshard_after_forward = reshard_after_forward
        self.reshard_after_backward = reshard_after_backward
        self.cpu_offload = cpu_offload
        self.prefetch = prefetch
        self._device = torch.device("cpu")

    @override
    def mesh_axes(self) -> Mapping[str, int]:
        return {"dp_replicate": self.replicate, "dp_shard": -1}

    @override
    def parallelize(self, model: nn.Module, context: SetupContext) -> nn.Module:
        self._device = context.device
        options: dict[str, Any] = {"mesh": context.state.parameter_mesh, "offload_policy": self._offload(context)}
        policy = _policy(context)
        units: dict[FSDPModule, bool] = {}
        for name in context.plan.keep_fp32 if context.precision.mixed else ():
            module = model.get_submodule(name)
            units[fully_shard(module, mp_policy=_fp32_policy(), reshard_after_forward=False, **options)] = False
        blocks = [model.get_submodule(name) for name in context.plan.blocks]
        for module in [*blocks, model]:
            # The backward starts with the last block, so its parameters stay, and those outside of the blocks: the loss
            # reads the head's weight. Unsharded ones would free nothing.
            reshard = self.reshard_after_forward and module not in [*blocks[-1:], model] and context.state.dims.fsdp > 1
            units[fully_shard(module, mp_policy=policy, reshard_after_forward=reshard, **options)] = reshard
        if context.state.dims.fsdp == 1:
            for unit in (module for module in model.modules() if isinstance(module, FSDPModule)):
                reduce_in_place(unit)
        set_prefetch(blocks, max(self.prefetch, 1 if context.placed else 0))
        ModelAdapter.of(model).add(FreeWithoutBackward(units))
        context.materialize(model, "")
        return model

    def _offload(self, context: SetupContext) -> OffloadPolicy:
        if not self.cpu_offload:
            return OffloadPolicy()
        return CPUOffloadPolicy(pin_memory=context.accelerator.supports_pinned_memory)

    @override
    def grad_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        return self._sync_on_last(set_up_as(FSDPModule, model), last)

    @contextmanager
    def _sync_on_last(self, model: FSDPModule, last: bool) -> Iterator[None]:
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        if not self.reshard_after_backward:
            model.set_reshard_after_backward(last)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
            model.set_is_last_backward(True)

    @override
    def grad_norm(self, model: nn.Module) -> Tensor:
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


def _policy(context: SetupContext) -> MixedPrecisionPolicy:
    precision = context.precision
    if not precision.mixed:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=precision.reduce)


def _fp32_policy() -> MixedPrecisionPolicy:
    # Modeling code that keeps a module in float32 casts that module's inputs itself.
    return MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
