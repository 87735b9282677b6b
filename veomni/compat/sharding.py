"""What DDP, FSDP1 and FSDP2 leave alone, free and copy."""

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.nn.parallel import DistributedDataParallel

HYBRID_SHARD_GRAD_OP = ShardingStrategy._HYBRID_SHARD_ZERO2
TORCH_COPY_IN = _fsdp_collectives.foreach_reduce_scatter_copy_in


def ignore_parameters(model: nn.Module, parameters: Set[nn.Parameter]) -> None:
    """Exclude parameters from the gradient averages and broadcasts of the DDP around ``model``."""
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter in parameters]
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def free_without_backward(model: nn.Module, args: Any, output: Any) -> None:
    """Free what FSDP1 keeps gathered for a backward, where none follows; a forward hook on the wrapper."""
    if torch.is_grad_enabled():
        return
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        handle = unit._handle
        if handle is not None and handle.uses_sharded_strategy and not handle.needs_unshard():
            _reshard(unit, handle, free_unsharded_flat_param=True)


def replace_copy_in(copy: Callable[..., None]) -> None:
    """Make FSDP2 copy gradients into the buffer it reduces with ``copy`` from now on, in all models."""
    _fsdp_collectives.foreach_reduce_scatter_copy_in = copy


def copy_gradients(unsharded_grads: list[Tensor], reduce_scatter_input: Tensor, world_size: int) -> None:
    """Write the part of every gradient that belongs to rank ``i``, one behind the other, into part ``i`` of a buffer.

    PyTorch copies all of a unit's gradients with one kernel, by tables with an entry for every few kilobytes that the
    host writes at each call: for the experts of one layer (128 x 4.7 M parameters, one H200) it took 12 ms, in which
    the device was idle, and the kernel took twice the time of plain copies. The buffer may have another dtype.
    """
    parts = reduce_scatter_input.view(world_size, -1)
    if any(grad.ndim == 0 or grad.shape[0] % world_size for grad in unsharded_grads):
        torch._chunk_cat(unsharded_grads, 0, world_size, out=parts)  # it pads
        return
    place = 0
    for grad in unsharded_grads:
        width = grad.numel() // world_size
        parts[:, place : place + width].copy_(grad.reshape(world_size, width))
        place += width
