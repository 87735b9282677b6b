"""Gradients copied one by one into the buffer that FSDP2 reduces.

PyTorch copies all of a unit's gradients with one kernel, by tables with an entry for every few kilobytes that the host
writes at each call: for the experts of one layer (128 x 4.7 M parameters, one H200) it took 12 ms, in which the device
was idle, and the kernel took twice the time of plain copies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from veomni.compat.private_name import PrivateName

_MODULE = "torch.distributed.fsdp._fully_shard._fsdp_collectives"
PRIVATE = (
    PrivateName(
        f"{_MODULE}:foreach_reduce_scatter_copy_in",
        reason="torch 2.11 has no way to replace the operation behind it, so the function that calls it is replaced",
        without="FSDP2 copies as PyTorch does: exact, and slower for many large parameters",
        parameters=("unsharded_grads", "reduce_scatter_input", "world_size"),
    ),
    PrivateName("torch:_chunk_cat", reason="pads gradients that do not divide", without="pad them one by one"),
)
_original = _fsdp_collectives.foreach_reduce_scatter_copy_in


def install() -> None:
    """Make FSDP2 copy gradients with :func:`copy_gradients` from now on, in all models."""
    _fsdp_collectives.foreach_reduce_scatter_copy_in = copy_gradients


def uninstall() -> None:
    """Make FSDP2 copy gradients as PyTorch does."""
    _fsdp_collectives.foreach_reduce_scatter_copy_in = _original


def copy_gradients(unsharded_grads: list[Tensor], reduce_scatter_input: Tensor, world_size: int) -> None:
    """Write the part of every gradient that belongs to rank ``i``, one behind the other, into part ``i`` of a buffer.

    Args:
        unsharded_grads: Gradients; their first dimension is what ranks share.
        reduce_scatter_input: One dimension, of another dtype, maybe; of equal parts for the ranks.
        world_size: Ranks that share the parameters.
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
