"""An all-to-all of equal shares as one operation: compiled graphs contain it, a recomputation may keep its result."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from veomni.compat.collectives import group_named


def exchange_evenly(rows: Tensor, group: ProcessGroup) -> Tensor:
    """Send each of the P ranks of a group its share of the rows, and return the rows received in the order of ranks.

    Rows are entries of the first dimension, a multiple of P. The gradient is the exchange back.
    """
    received: Tensor = _exchange(rows, group.group_name)
    return received


# A graph holds the name of a group where it cannot hold the group; models with other groups have other names.
@torch.library.custom_op("veomni::exchange_evenly", mutates_args=())
def _exchange(rows: Tensor, group: str) -> Tensor:
    received = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, rows.contiguous(), group=group_named(group))
    return received


@_exchange.register_fake
def _shape(rows: Tensor, group: str) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _set_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.group = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _exchange(grad, ctx.group), None


_exchange.register_autograd(_backward, setup_context=_set_context)
