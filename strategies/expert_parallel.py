"""Spread the experts of every layer over ranks, beside any strategy that holds the other parameters.

Experts are DTensors: ``Shard(0)`` over ``ep``, and sharded once more by ``fully_shard`` over ``ep_fsdp``, so that any
checkpoint reshards. Each rank's gradient is the sum over the tokens that its ``ep`` peers sent it, so the average over
all tokens divides by the ranks of the ``loss`` view, not by those that hold a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from typing_extensions import override

from veomni.compat.inplace_reduce_scatter import reduce_in_place
from veomni.errors import LayoutError, ModelError
from veomni.ops.experts.exchange import EXCHANGE, Dispatch, ExpertExchange
from veomni.ops.experts.shared import shared_experts_beside
from veomni.parallel.mesh import ParallelState
from veomni.parallel.plan import ParallelPlan
from veomni.strategies.base import SetupContext, Stage, Strategy
from veomni.strategies.transforms.gathered import FreeWithoutBackward
from veomni.strategies.transforms.precision import Precision

if TYPE_CHECKING:
    from veomni.models.adapter.adapter import ModelAdapter

Placement = Literal["adjacent", "strided"]
ExchangeSize = Literal["exact", "fixed"]
_FIX = "leave expert parallelism out"


class ExpertParallel(Strategy):
    """Share the experts of every layer between ranks; composes with any strategy that holds parameters.

    Args:
        size: Ranks that share the experts of a layer; divides the ranks that share parameters (or is a multiple of
            them that divides all ranks, as beside DDP), and the experts.
        placement: "adjacent" ranks share experts, or "strided" ones: then each expert is gathered among neighbours, and
            tokens are exchanged between nodes.
        chunks: Parts of the tokens, each exchanged while experts run on another.
        exchange: "exact" sends the rows there are, whose number the host reads once per layer; "fixed" sends buffers
            of the largest possible size and reads nothing.
    """

    name = "expert_parallel"
    stage = Stage.EXPERTS

    def __init__(
        self, size: int, *, placement: Placement = "adjacent", chunks: int = 1, exchange: ExchangeSize = "exact"
    ) -> None:
        for name, value in (("size", size), ("chunks", chunks)):
            if value < 1:
                raise LayoutError(f"expert parallelism has {name} {value}", "give a positive number")
        if placement not in ("adjacent", "strided"):
            raise LayoutError(f"experts have no placement {placement!r}", "use adjacent or strided")
        if exchange not in ("exact", "fixed"):
            raise LayoutError(f"experts have no exchange {exchange!r}", "use exact or fixed")
        self.size, self.placement, self.chunks, self.exchange = size, placement, chunks, exchange

    @override
    def mesh_axes(self) -> Mapping[str, int]:
        return {"ep" if self.placement == "adjacent" else "ep_strided": self.size}

    @override
    def transform(self, adapter: ModelAdapter, context: SetupContext) -> None:
        """Leave each rank its shard of its experts of every layer.

        Raises:
            ModelError: the model has no experts, or they do not divide.
        """
        if self.size == 1:
            return
        model, state = adapter.model, context.state
        check_experts(model, context.plan, self.size)
        reshard = context.parameters.reshard_after_forward and state.size("ep_fsdp") > 1
        units: dict[FSDPModule, bool] = {}
        for name in context.plan.experts:
            module = model.get_submodule(name)
            _split_experts(module, state)
            adapter.patch(module, EXCHANGE, self._exchange_of(adapter, name, state))
            units[_shard_experts(module, context, reshard)] = reshard
            context.placed[name] = module
        adapter.add(FreeWithoutBackward(units))

    def _exchange_of(self, adapter: ModelAdapter, name: str, state: ParallelState) -> ExpertExchange:
        plain = ExpertExchange(state.group("ep"), self.chunks, fixed_size=self.exchange == "fixed")
        experts = int(adapter.model.get_submodule(name).num_experts)  # type: ignore[arg-type]

        def dispatch(hidden: Tensor, index: Tensor) -> Dispatch:
            return Dispatch(hidden, index, experts, plain)

        shared = shared_experts_beside(adapter.model, name, dispatch, adapter.patch)
        return replace(plain, shared=shared)

    @override
    def grad_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                unit.set_requires_gradient_sync(last, recurse=False)
                unit.set_is_last_backward(last)
        return nullcontext()


def check_experts(model: nn.Module, plan: ParallelPlan, size: int) -> None:
    """Check that ``size`` ranks can share the experts of every layer; the meta device will do.

    Raises:
        ModelError: the model has no experts, they do not divide, or a layer's parameters are no stacks of experts.
    """
    if not plan.experts:
        raise ModelError(
            f"{type(model).__name__} has no experts that run through transformers' interface",
            _FIX,
            "ExpertParallel.size",
        )
    for name in plan.experts:
        module = model.get_submodule(name)
        experts = int(module.num_experts)  # type: ignore[arg-type]
        if experts % size:
            raise ModelError(
                f"the {experts} experts of {name} do not divide by expert parallel size {size}",
                f"use a divisor of {experts}",
            )
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.shape[0] != experts:
                raise ModelError(
                    f"{name}.{key} {list(parameter.shape)} is not a stack of {experts} experts",
                    _FIX,
                    "ExpertParallel.size",
                )


def _split_experts(module: nn.Module, state: ParallelState) -> None:
    mesh = state.mesh("ep")
    for key, parameter in list(module.named_parameters(recurse=False)):
        local = parameter.shape[0] // mesh.size()
        own = parameter.detach().narrow(0, mesh.get_local_rank() * local, local).clone()
        whole = DTensor.from_local(
            own, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        module.register_parameter(key, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _shard_experts(module: nn.Module, context: SetupContext, reshard: bool) -> FSDPModule:
    """Shard each expert over ``ep_fsdp``, and what all of them share (a norm behind them) as other parameters are."""
    state = context.state
    offload = CPUOffloadPolicy(pin_memory=context.accelerator.supports_pinned_memory)
    options: dict[str, Any] = {
        "mp_policy": _policy(context.precision),
        "offload_policy": offload if context.parameters.cpu_offload else OffloadPolicy(),
        "reshard_after_forward": reshard,
    }
    for child in module.children():
        if next(child.parameters(), None) is not None:
            fully_shard(child, mesh=state.parameter_mesh, **options)
    place = partial(_placement, ranks=state.size("ep_fsdp"))
    fully_shard(module, mesh=state.expert_mesh, shard_placement_fn=place, **options)
    assert isinstance(module, FSDPModule)
    average_over(module, state.size("loss"))
    if state.size("ep_fsdp") == 1:
        reduce_in_place(module)
    return module


def average_over(module: FSDPModule, ranks: int) -> None:
    """Sum the gradients over the ranks that hold them, and divide by ``ranks``."""

    def divide(summed: Tensor) -> None:
        summed.div_(ranks)
        if summed.device.type != "cpu":  # it runs on another stream than the one the sum was allocated on
            summed.record_stream(torch.accelerator.current_stream())

    # FSDP's own divisor is applied twice where one rank holds an expert alone (torch 2.13); and with any other divisor
    # than the group's size it needs a collective that multiplies, which only NCCL has.
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    module.set_all_reduce_hook(divide)


def _placement(parameter: nn.Parameter, ranks: int) -> Shard:
    """Return the dimension that ``ranks`` ranks share evenly: the first behind that of the experts."""
    for dim in range(1, parameter.ndim):
        if parameter.shape[dim] % ranks == 0:
            return Shard(dim)
    raise ModelError(
        f"no dimension of experts {list(parameter.shape)} divides by the {ranks} ranks that share each of them",
        "use a larger expert parallel size, or another number of ranks",
    )


def _policy(precision: Precision) -> MixedPrecisionPolicy:
    if not precision.mixed:
        return MixedPrecisionPolicy()
    # Routing weights keep their float32; experts cast the rows themselves.
    return MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=precision.reduce, cast_forward_inputs=False)


__all__ = ["ExpertParallel", "average_over", "check_experts"]
