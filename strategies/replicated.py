"""Strategies under which every rank holds all parameters: one process, and distributed data parallel."""

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.distributed import GradBucket, ProcessGroup  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from veomni.compat.sharding import ignore_parameters
from veomni.config.section import Validated
from veomni.errors import LayoutError
from veomni.strategies.base import ParameterStrategy, SetupContext, set_up_as


class Single(ParameterStrategy):
    """No parallelism: one process, one device; the reference that every other strategy must reproduce."""

    name = "single"

    @override
    def check(self, world_size: int) -> None:
        if world_size != 1:
            problem = f"strategy single was given {world_size} ranks"
            raise LayoutError(problem, "start one process, or use DDP, FSDP1 or FSDP2")

    @override
    def parallelize(self, model: nn.Module, context: SetupContext) -> nn.Module:
        context.materialize(model, "")
        return model.to(context.device)

    @override
    def grad_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(eq=False, kw_only=True)
class DDP(Validated, ParameterStrategy):
    """Replicate parameters, average gradients over all ranks.

    Args:
        find_unused_parameters: Search each step for parameters that got no gradient; needed when parts of the model are
            skipped in some batches, and slower.
        bucket_cap_mb: Size of a gradient bucket in MiB.
    """

    name = "ddp"

    find_unused_parameters: bool = False
    bucket_cap_mb: Annotated[int, Ge(1)] = 100

    @override
    def mesh_axes(self) -> Mapping[str, int]:
        return {"dp_replicate": -1, "dp_shard": 1}

    @override
    def parallelize(self, model: nn.Module, context: SetupContext) -> nn.Module:
        context.materialize(model, "")
        ignore_parameters(model, context.placed_parameters())
        wrapped = DistributedDataParallel(
            model.to(context.device),
            device_ids=[context.device] if context.device.index is not None else None,
            process_group=context.state.group("loss"),
            bucket_cap_mb=self.bucket_cap_mb,
            find_unused_parameters=self.find_unused_parameters,
            gradient_as_bucket_view=True,
            **_keep_buffers_local(),
        )
        if context.precision.reduce is torch.bfloat16:
            wrapped.register_comm_hook(context.state.group("loss"), average_in_bf16)
        return wrapped

    @override
    def grad_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        wrapped = set_up_as(DistributedDataParallel, model)
        return nullcontext() if last else wrapped.no_sync()


def average_in_bf16(group: ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
    """Average a bucket of gradients in bf16: PyTorch's hook, which DDP takes by its own name with NCCL only."""
    return bf16_compress_hook(group, bucket)


def _keep_buffers_local() -> dict[str, Any]:
    # torch 2.13 renamed the argument that stops buffers from being sent before every forward.
    names = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
