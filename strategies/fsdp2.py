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

from veomni.compat.fsdp_copy_in import copy_one_by_one
from veomni.compat.inplace_reduce_scatter import reduce_in_place
from veomni.parallel.mesh import ParallelState
from veomni.parallel.plan import ParallelPlan
from veomni.strategies.base import ParameterStrategy, SetupContext
from veomni.strategies.expert_parallel import ExchangeSize, ExpertParallel
from veomni.strategies.grad_norm import sharded_grad_norm
from veomni.strategies.transforms.compute_dtype import compute_in


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
        expert_parallel_size: Ranks that share the experts of every layer.
        expert_parallel_outside: See :class:`~veomni.strategies.expert_parallel.ExpertParallel`, like the next two.
        expert_chunks: Parts of the tokens that travel one behind the other.
        expert_exchange: "exact" or "fixed".
    """

    name = "fsdp2"

    def __init__(
        self,
        *,
        replicate: int = 1,
        reshard_after_forward: bool = True,
        reshard_after_backward: bool = True,
        cpu_offload: bool = False,
        prefetch: int = 0,
        expert_parallel_size: int = 1,
        expert_parallel_outside: bool = False,
        expert_chunks: int = 1,
        expert_exchange: ExchangeSize = "exact",
    ) -> None:
        self.replicate = replicate
        self.reshard_after_forward = reshard_after_forward
        self.reshard_after_backward = reshard_after_backward
        self.cpu_offload = cpu_offload
        self.prefetch = prefetch
        self.experts = ExpertParallel(expert_parallel_size, expert_parallel_outside, expert_chunks, expert_exchange)
        self._device = torch.device("cpu")

    @override
    def mesh_axes(self) -> Mapping[str, int]:
        return {"dp_replicate": self.replicate, "dp_shard": -1, **self.experts.mesh_axes()}

    @override
    def prepare(self, model: nn.Module, plan: ParallelPlan, state: ParallelState) -> None:
        self.experts.split(model, plan, state)

    @override
    def parallelize(self, model: nn.Module, context: SetupContext) -> nn.Module:
        self._device = context.device
        copy_one_by_one()
        compute_in(model, context.precision, context.device.type, autocast=False)
        options: dict[str, Any] = {"mesh": context.state.parameter_mesh, "offload_policy": self._offload(context)}
        policy = _policy(context)
        for name in context.plan.keep_fp32 if context.precision.mixed else ():
            fully_shard(model.get_submodule(name), mp_policy=_fp32_policy(), reshard_after_forward=False, **options)
        experts = self.experts.shard(
            model, context.plan, context.state, context.precision,
            reshard_after_forward=self.reshard_after_forward, offload_policy=options["offload_policy"],
        )  # fmt: skip
        blocks = [model.get_submodule(name) for name in context.plan.blocks]
        for block in blocks:
            # The backward starts with the last block, so its parameters stay; unsharded ones would free nothing.
            reshard = self.reshard_after_forward and block is not blocks[-1] and context.state.dims.fsdp > 1
            fully_shard(block, mp_policy=policy, reshard_after_forward=reshard, **options)
        # The root keeps what is outside the blocks gathered until the backward: the loss reads the head's weight.
        fully_shard(model, mp_policy=policy, reshard_after_forward=False, **options)
        if context.state.dims.fsdp == 1:
            for unit in (module for module in model.modules() if isinstance(module, FSDPModule)):
                reduce_in_place(unit)
        model.register_forward_hook(reshard_without_backward)
        set_prefetch(blocks, max(self.prefetch, 1 if experts else 0))
        context.materialize(model, "")
        return model

    def _offload(self, context: SetupContext) -> OffloadPolicy:
        if not self.cpu_offload:
            return OffloadPolicy()
        return CPUOffloadPolicy(pin_memory=context.accelerator.supports_pinned_memory)

    @override
    def grad_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        assert isinstance(model, FSDPModule)
        return self._sync_on_last(model, last)

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


def reshard_without_backward(model: nn.Module, args: Any, output: Any) -> None:
    """Free what stays gathered from forward to backward, after a forward that has none; a forward hook.

    What was left gathered would be used by the next forward, though an optimizer has changed the shards by then.
    """
    if not torch.is_grad_enabled():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _policy(context: SetupContext) -> MixedPrecisionPolicy:
    precision = context.precision
    if not precision.mixed:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=precision.reduce)


def _fp32_policy() -> MixedPrecisionPolicy:
    # Modeling code that wants a module in float32 casts that module's inputs by itself.
    return MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
