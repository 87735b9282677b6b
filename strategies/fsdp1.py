"""Fully sharded data parallel, first generation: flat parameters per block, inside a wrapper module."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import CustomPolicy
from typing_extensions import override

from veomni.compat.sharding import HYBRID_SHARD_GRAD_OP, free_without_backward
from veomni.config.section import Validated
from veomni.logging import create_logger
from veomni.strategies.base import ParameterStrategy, SetupContext, set_up_as
from veomni.strategies.grad_norm import sharded_grad_norm

logger = create_logger(__name__)

_STRATEGIES = {
    ("full", False): ShardingStrategy.FULL_SHARD,
    ("grad_op", False): ShardingStrategy.SHARD_GRAD_OP,
    ("full", True): ShardingStrategy.HYBRID_SHARD,
    ("grad_op", True): HYBRID_SHARD_GRAD_OP,
}


@dataclass(eq=False, kw_only=True)
class FSDP1(Validated, ParameterStrategy):
    """Shard parameters, gradients and optimizer state with ``FullyShardedDataParallel``.

    Args:
        replicate: Number of replicas of the sharded model; more than 1 is hybrid sharding.
        sharding: "full" frees parameters after the forward, "grad_op" keeps them until the backward is done.
        cpu_offload: Keep parameters and gradients in host memory.
        forward_prefetch: Gather the next block's parameters before this one's forward has ended.
    """

    name = "fsdp1"
    casts_parameters = True

    replicate: Annotated[int, Ge(1)] = 1
    sharding: Literal["full", "grad_op"] = "full"
    cpu_offload: bool = False
    forward_prefetch: bool = False

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self.reshard_after_forward = self.sharding == "full"

    @override
    def mesh_axes(self) -> Mapping[str, int]:
        return {"dp_replicate": self.replicate, "dp_shard": -1}

    @override
    def parallelize(self, model: nn.Module, context: SetupContext) -> nn.Module:
        self._state, self._device = context.state, context.device
        names = {id(module): name for name, module in model.named_modules()}
        for name, module in model.named_modules():
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)) and not list(module.parameters()):
                context.materialize(module, name)  # FSDP1 materialises only modules that have parameters
        for name, module in context.placed.items():  # FSDP1 ignores them
            context.materialize(module, name)
        if self.cpu_offload and context.device.type == "cpu":  # FSDP1 would pin the memory, which needs an accelerator
            logger.info_rank0("cpu_offload changes nothing here: parameters of a CPU run are in host memory already")
        formats = MixedPrecision(context.precision.compute, context.precision.reduce, cast_root_forward_inputs=True)
        wrapped = FullyShardedDataParallel(
            model,
            device_mesh=context.state.parameter_mesh,
            sharding_strategy=_STRATEGIES[self.sharding, self.replicate > 1],
            auto_wrap_policy=_wrap_policy(model, context),
            mixed_precision=formats if context.precision.mixed else None,
            cpu_offload=CPUOffload(offload_params=self.cpu_offload and context.device.type != "cpu"),
            forward_prefetch=self.forward_prefetch,
            device_id=context.device,
            param_init_fn=lambda module: context.materialize(module, names[id(module)]),
            use_orig_params=True,
            ignored_states=list(context.placed_parameters()),
        )
        wrapped.register_forward_hook(free_without_backward)
        return wrapped

    @override
    def grad_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        wrapped = set_up_as(FullyShardedDataParallel, model)
        return nullcontext() if last else wrapped.no_sync()

    @override
    def grad_norm(self, model: nn.Module) -> Tensor:
        """Sum the squares of this rank's shards over the shard group; replicas hold the same and are not summed."""
        wrapped = set_up_as(FullyShardedDataParallel, model)
        return sharded_grad_norm(wrapped.parameters(), self._device, self._state.group("fsdp"))


def _wrap_policy(model: nn.Module, context: SetupContext) -> CustomPolicy:
    blocks = {id(model.get_submodule(name)) for name in context.plan.blocks}
    keep_fp32 = {id(model.get_submodule(name)) for name in context.plan.keep_fp32}

    def wrap(module: nn.Module) -> bool | dict[str, Any]:
        if id(module) in keep_fp32 and context.precision.mixed:
            return {"mixed_precision": None}
        return id(module) in blocks

    return CustomPolicy(wrap)
