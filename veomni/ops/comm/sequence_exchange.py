"""Move a sequence that is split over ranks: exchange it for heads and back, put it together.

Shapes are ``[batch, seq, heads, head_dim]``; of the P ranks of a group, each in turn holds ``seq / P`` positions.
Gradients are the exact ones of the whole computation: what is summed over ranks is summed here, nothing is divided.
The exchange is DeepSpeed-Ulysses' (Jacobs et al., 2023, arXiv:2309.14509): one all-to-all of ``1 / P`` to each rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from veomni.ops.comm.even_exchange import exchange_evenly


def gather_seq_scatter_heads(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Give each rank all positions of its share of the heads, for several tensors in one exchange.

    From ``[batch, seq / P, heads, head_dim]``, whose heads (a multiple of P) and head_dim may differ, to
    ``[batch, seq, heads / P, head_dim]``; views of one buffer where ``batch`` is 1.
    """
    shares = [tensor.unflatten(2, (group.size(), -1)).permute(2, 0, 1, 3, 4) for tensor in tensors]
    received = exchange_evenly(torch.cat([share.flatten(3) for share in shares], dim=-1), group)
    rows = received.transpose(0, 1).flatten(1, 2).split([share.shape[3] * share.shape[4] for share in shares], dim=-1)
    return [part.unflatten(-1, share.shape[3:]) for part, share in zip(rows, shares, strict=True)]


def gather_heads_scatter_seq(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Give each rank all heads of its share of the positions, ``[batch, seq / P, heads, head_dim]``: the way back."""
    received = exchange_evenly(tensor.unflatten(1, (group.size(), -1)).transpose(0, 1), group)
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


def gather_sequence(tensor: Tensor, group: ProcessGroup, *, dim: int) -> Tensor:
    """Return all ranks' parts in order; the gradient of a part is the sum over what all ranks did with it."""
    result: Tensor = _Gather.apply(group, tensor, dim)
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, tensor: Tensor, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        parts = tensor.new_empty(group.size(), *tensor.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), tensor.contiguous(), group=group)
        return torch.cat(parts.unbind(), dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole = grads[0].contiguous()
        dist.all_reduce(whole, group=ctx.group)
        return None, whole.chunk(ctx.group.size(), dim=ctx.dim)[ctx.group.rank()].contiguous(), None
