"""Spread the experts of every layer over ranks, beside whatever shards the other parameters.

Experts are DTensors: ``Shard(0)`` over ``ep``, and sharded once more by ``fully_shard`` over ``ep_fsdp``, so that any
checkpoint reshards. Each rank's gradient is the sum over the tokens that its ``ep`` peers sent it, so the average over
all tokens divides by the ranks of the ``loss`` view, not by those that hold a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from veomni.compat.inplace_reduce_scatter import reduce_in_place
from veomni.errors import LayoutError, ModelError
from veomni.ops.experts.exchange import EXCHANGE, Dispatch, ExpertExchange
from veomni.ops.experts.shared import shared_experts_beside
from veomni.parallel.mesh import ParallelState
from veomni.parallel.plan import ParallelPlan
from veomni.strategies.transforms.precision import Precision

ExchangeSize = Literal["exact", "fixed"]
_FIX = "set train.expert_parallel_size to 1"


@dataclass(frozen=True)
class ExpertParallel:
    """What FSDP1 and FSDP2 are told about experts.

    Attributes:
        size: Ranks that share the experts of a layer; divides the ranks that share parameters, and the experts.
        outside: Whether ranks that share experts are far apart, so that each expert is gathered among neighbours;
            by default they are neighbours.
        chunks: Parts of the tokens that travel one behind the other, each while experts work on another.
        exchange: "exact" sends the rows there are, whose number the host reads once per layer; "fixed" sends buffers
            of the largest possible size and reads nothing.
    """

    size: int = 1
    outside: bool = False
    chunks: int = 1
    exchange: ExchangeSize = "exact"

    def __post_init__(self) -> None:
        for name in ("size", "chunks"):
            if getattr(self, name) < 1:
                raise LayoutError(f"expert parallelism has {name} {getattr(self, name)}", "give a positive number")
        if self.exchange not in ("exact", "fixed"):
            raise LayoutError(f"experts have no exchange {self.exchange!r}", "use exact or fixed")

    def mesh_axes(self) -> Mapping[str, int]:
        """Return what the mesh must know."""
        return {"ep": self.size, "ep_outside": self.outside}

    def split(self, model: nn.Module, plan: ParallelPlan, state: ParallelState) -> None:
        """Leave each rank its experts of every layer, as DTensors; ``model`` may be on the meta device.

        Raises:
            ModelError: the model has no experts, or they do not divide.
        """
        if self.size == 1:
            return
        refuse_experts(model, plan, self.size)
        for name in plan.experts:
            module = model.get_submodule(name)
            _split_experts(module, state)
            setattr(module, EXCHANGE, self._exchange_of(model, name, state))

    def _exchange_of(self, model: nn.Module, name: str, state: ParallelState) -> ExpertExchange:
        plain = ExpertExchange(state.group("ep"), self.chunks, fixed_size=self.exchange == "fixed")
        experts = int(model.get_submodule(name).num_experts)  # type: ignore[arg-type]
        shared = shared_experts_beside(model, name, lambda hidden, index: Dispatch(hidden, index, experts, plain))
        return replace(plain, shared=shared)

    def shard(
        self,
        model: nn.Module,
        plan: ParallelPlan,
        state: ParallelState,
        precision: Precision,
        *,
        reshard_after_forward: bool,
        offload_policy: OffloadPolicy,
    ) -> list[FSDPModule]:
        """Shard every expert over ``ep_fsdp`` and return the modules that were: one per layer, in order."""
        if self.size == 1:
            return []
        options: dict[str, Any] = {
            "mp_policy": _policy(precision),
            "offload_policy": offload_policy,
            "reshard_after_forward": reshard_after_forward and state.size("ep_fsdp") > 1,
        }
        units: list[FSDPModule] = []
        place = partial(_placement, ranks=state.size("ep_fsdp"))
        for name in plan.experts:
            module = model.get_submodule(name)
            for child in module.children():  # what all experts share (a norm behind them) is no expert
                if next(child.parameters(), None) is not None:
                    fully_shard(child, mesh=state.parameter_mesh, **options)
            fully_shard(module, mesh=state.expert_mesh, shard_placement_fn=place, **options)
            assert isinstance(module, FSDPModule)
            average_over(module, state.size("loss"))
            if state.size("ep_fsdp") == 1:
                reduce_in_place(module)
            units.append(module)
        return units


def refuse_experts(model: nn.Module, plan: ParallelPlan, size: int) -> None:
    """Check that ``size`` ranks can share the experts of every layer; the meta device will do.

    Raises:
        ModelError: the model has no experts, they do not divide, or a layer's parameters are no stacks of experts.
    """
    if not plan.experts:
        raise ModelError(f"{type(model).__name__} has no experts that run through transformers' interface", _FIX)
    for name in plan.experts:
        module = model.get_submodule(name)
        experts = int(module.num_experts)  # type: ignore[arg-type]
        if experts % size:
            raise ModelError(
                f"the {experts} experts of {name} do not divide by train.expert_parallel_size {size}",
                f"use a divisor of {experts}",
            )
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.shape[0] != experts:
                raise ModelError(f"{name}.{key} {list(parameter.shape)} is not a stack of {experts} experts", _FIX)


def _split_experts(module: nn.Module, state: ParallelState) -> None:
    mesh = state.mesh("ep")
    for key, parameter in list(module.named_parameters(recurse=False)):
        local = parameter.shape[0] // mesh.size()
        own = parameter.detach().narrow(0, mesh.get_local_rank() * local, local).clone()
        whole = DTensor.from_local(
            own, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        module.register_parameter(key, nn.Parameter(whole, requires_grad=parameter.requires_grad))


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
        "use a larger train.expert_parallel_size, or another number of ranks",
    )


def _policy(precision: Precision) -> MixedPrecisionPolicy:
    if not precision.mixed:
        return MixedPrecisionPolicy()
    # Routing weights keep their float32; experts cast the rows themselves.
    return MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=precision.reduce, cast_forward_inputs=False)


__all__ = ["ExchangeSize", "ExpertParallel"]
