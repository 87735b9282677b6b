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

from veomni.ops.comm.all_to_all import all_to_all


def gather_seq_scatter_heads(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Give each rank all positions of its share of the heads, for several tensors in one exchange.

    From ``[batch, seq / P, heads, head_dim]``, whose heads (a multiple of P) and head_dim may differ, to
    ``[batch, seq, heads / P, head_dim]``; views of one buffer where ``batch`` is 1.
    """
    return list(_SeqForHeads.apply(group, True, *tensors))


def gather_heads_scatter_seq(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Give each rank all heads of its share of the positions, ``[batch, seq / P, heads, head_dim]``: the way back."""
    result: Tensor = _SeqForHeads.apply(group, False, tensor)[0]
    return result


def gather_sequence(tensor: Tensor, group: ProcessGroup, *, dim: int) -> Tensor:
    """Return all ranks' parts in order; the gradient of a part is the sum over what all ranks did with it."""
    result: Tensor = _Gather.apply(group, tensor, dim)
    return result


class _SeqForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, to_heads: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.to_heads = group, to_heads
        return tuple((_send_heads if to_heads else _send_rows)(tensors, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(_send_rows if ctx.to_heads else _send_heads)(grads, ctx.group)


def _send_heads(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    parts = [tensor.unflatten(2, (group.size(), -1)).permute(2, 0, 1, 3, 4) for tensor in tensors]
    return [part.transpose(0, 1).flatten(1, 2) for part in _exchange(parts, group)]


def _send_rows(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    parts = [tensor.unflatten(1, (group.size(), -1)).transpose(0, 1) for tensor in tensors]
    return [part.permute(1, 2, 0, 3, 4).flatten(2, 3) for part in _exchange(parts, group)]


def _exchange(parts: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Send each rank its entry of ``[P, batch, seq / P, heads / P, head_dim]``, of all tensors in one buffer."""
    widths = [part.shape[3] * part.shape[4] for part in parts]
    buffer = parts[0].new_empty(*parts[0].shape[:3], sum(widths))
    for part, room in zip(parts, buffer.split(widths, dim=-1), strict=True):
        room.unflatten(-1, part.shape[3:]).copy_(part)
    received = all_to_all(buffer, None, group).split(widths, dim=-1)
    return [room.unflatten(-1, part.shape[3:]) for part, room in zip(parts, received, strict=True)]


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
