"""Experts spread over ranks, as DTensors: ``Shard(0)`` over ``ep``, and by ``fully_shard`` over ``ep_fsdp``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from typing_extensions import override

from veomni.config.section import Validated
from veomni.errors import ModelError
from veomni.ops.experts.exchange import EXCHANGE, Dispatch, ExpertExchange
from veomni.ops.experts.shared import shared_experts_beside
from veomni.parallel.mesh import ParallelDims, ParallelState
from veomni.strategies.base import SetupContext, Stage, Strategy
from veomni.strategies.units import ShardedUnits, cast_policy

if TYPE_CHECKING:
    from veomni.models.adapter.adapter import ModelAdapter

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_FIX = "leave expert parallelism out", "ExpertParallel.size"


@dataclass(eq=False)
class ExpertParallel(Validated, Strategy):
    """Share the experts of every layer between ranks; composes with any strategy that holds parameters.

    Args:
        size: Ranks that share the experts of a layer; divides the ranks that share parameters (or is a multiple of
            them that divides all ranks, as beside DDP), and the experts.
        placement: "adjacent" ranks share experts, or "strided" ones: then each expert is gathered among neighbours, and
            tokens are exchanged between nodes.
        chunks: Parts of the tokens, each exchanged while experts run on another.
        exchange: "exact" sends a token to the ranks that hold some of its experts; the host reads once per layer how
            many. "fixed" sends every token to all ranks, and the host reads nothing: ranks must have equally many.
    """

    name = "expert_parallel"
    stage = Stage.EXPERTS

    size: Annotated[int, Ge(1)]
    _: KW_ONLY
    placement: Literal["adjacent", "strided"] = "adjacent"
    chunks: Annotated[int, Ge(1)] = 1
    exchange: Literal["exact", "fixed"] = "exact"

    @override
    def mesh_axes(self) -> Mapping[str, int]:
        return {"ep" if self.placement == "adjacent" else "ep_strided": self.size}

    @override
    def check_model(self, facts: Mapping[str, Any], row_length: int, dims: ParallelDims) -> None:
        experts = next((facts[key] for key in _EXPERT_COUNTS if facts.get(key)), None)
        if experts is not None:  # other models name them otherwise: transform() checks
            self._check_count(experts, "the model")

    @override
    def transform(self, adapter: ModelAdapter, context: SetupContext) -> None:
        if self.size == 1:
            return
        model, names, units = adapter.model, context.plan.experts, ShardedUnits(context)
        if not names:
            raise ModelError(f"{type(model).__name__} has no experts that run through transformers' interface", *_FIX)
        for name in names:
            self._check_stacks(name, model.get_submodule(name))
        for name in names:
            module = context.placed[name] = model.get_submodule(name)
            _split_experts(module, context.state)
            adapter.patch(module, EXCHANGE, self._exchange_of(adapter, name, context.state))
            _shard_experts(module, units, context)
        adapter.add(units)

    def _check_stacks(self, name: str, module: nn.Module) -> None:
        experts = int(module.num_experts)  # type: ignore[arg-type]
        self._check_count(experts, name)
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.shape[0] != experts:
                shape = list(parameter.shape)
                raise ModelError(f"{name}.{key} {shape} is not a stack of {experts} experts", *_FIX)

    def _check_count(self, experts: int, name: str) -> None:
        if experts % self.size:
            divisors = ", ".join(str(size) for size in range(1, experts + 1) if experts % size == 0)
            problem = f"expert parallel size {self.size} does not divide the {experts} experts of {name}"
            raise ModelError(problem, f"use one of {divisors}", "ExpertParallel.size")

    def _exchange_of(self, adapter: ModelAdapter, name: str, state: ParallelState) -> ExpertExchange:
        plain = ExpertExchange(state.group("ep"), self.chunks, fixed_size=self.exchange == "fixed")
        experts = int(adapter.model.get_submodule(name).num_experts)  # type: ignore[arg-type]
        dispatch = partial(Dispatch, local_experts=experts // self.size, exchange=plain)
        shared = shared_experts_beside(adapter.model, name, dispatch, adapter.patch)
        return replace(plain, shared=shared)

    @override
    def grad_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                unit.set_requires_gradient_sync(last, recurse=False)
                unit.set_is_last_backward(last)
        return nullcontext()


def _split_experts(module: nn.Module, state: ParallelState) -> None:
    mesh = state.mesh("ep")
    for key, parameter in list(module.named_parameters(recurse=False)):
        local = parameter.shape[0] // mesh.size()
        own = parameter.detach().narrow(0, mesh.get_local_rank() * local, local).clone()
        whole = DTensor.from_local(
            own, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        module.register_parameter(key, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _shard_experts(module: nn.Module, units: ShardedUnits, context: SetupContext) -> None:
    """Shard each expert over ``ep_fsdp``, and what all of them share (a norm behind them) as other parameters are."""
    state, ranks = context.state, context.state.size("ep_fsdp")
    reshard = context.parameters.reshard_after_forward and ranks > 1
    policy = cast_policy(context.precision, cast_inputs=False)  # routing weights stay float32; experts cast the rows
    for child in module.children():
        if next(child.parameters(), None) is not None:
            units.add(child, state.parameter_mesh, policy, reshard=reshard)
    place = partial(_placement, ranks=ranks)
    unit = units.add(module, state.expert_mesh, policy, reshard=reshard, shard_placement_fn=place)
    average_over(unit, state.size("loss"))


def average_over(module: FSDPModule, ranks: int) -> None:
    """Sum the gradients over the ranks that hold them, and divide by ``ranks``.

    Each rank's gradient of an expert is the sum over the tokens that its ``ep`` peers sent it, so the average over all
    tokens divides by the ranks of the ``loss`` view, not by those that hold a copy.
    """

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
    problem = f"no dimension of experts {list(parameter.shape)} divides by the {ranks} ranks that share each of them"
    raise ModelError(problem, "use a larger expert parallel size, or another number of ranks")
