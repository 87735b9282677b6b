"""FSDP1: its hybrid of replicas and sharded gradients, and parameters freed without a backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp._runtime_utils import _reshard

from veomni.compat.private_name import PrivateName

_HANDLE = "torch.distributed.fsdp._flat_param:FlatParamHandle"
PRIVATE = (
    PrivateName(
        "torch.distributed.fsdp:ShardingStrategy._HYBRID_SHARD_ZERO2",
        reason='FSDP1(replicate=2, sharding="grad_op")',
        without="reject that combination",
    ),
    PrivateName(
        "torch.distributed.fsdp._runtime_utils:_reshard",
        reason="a forward without a backward leaves parameters gathered, and an optimizer would step on the copies",
        without="train wrongly after an evaluation between forward and step: reject FSDP1",
        parameters=("state", "handle", "free_unsharded_flat_param"),
    ),
    PrivateName(f"{_HANDLE}.uses_sharded_strategy", reason="whether a unit shards", without="see _reshard"),
    PrivateName(f"{_HANDLE}.needs_unshard", reason="whether a unit is gathered", without="see _reshard"),
)
HYBRID_SHARD_GRAD_OP = ShardingStrategy._HYBRID_SHARD_ZERO2


def free_without_backward(model: nn.Module, args: Any, output: Any) -> None:
    """Free what FSDP1 keeps gathered for a backward, where none follows; a forward hook on the wrapper."""
    if torch.is_grad_enabled():
        return
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        handle = unit._handle
        if handle is not None and handle.uses_sharded_strategy and not handle.needs_unshard():
            _reshard(unit, handle, free_unsharded_flat_param=True)
