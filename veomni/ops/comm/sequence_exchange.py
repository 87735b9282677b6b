"""Move a sequence that is split over ranks: exchange it for heads and back, cut it, put it together.

Shapes are ``[batch, seq, heads, head_dim]``; ``P`` is the size of the group, and rank ``r`` holds positions
``r * seq / P`` to ``(r + 1) * seq / P``. Every function is differentiable, and its gradient is the exact one of the
whole computation: what is summed over ranks is summed here, nothing is divided.

The exchange is DeepSpeed-Ulysses' (Jacobs et al., 2023, arXiv:2309.14509): one all-to-all, in which each rank sends
every other ``1 / P`` of what it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from veomni.ops.comm.all_to_all import all_to_all


def gather_seq_scatter_heads(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Give each rank all positions of its share of the heads, for several tensors in one exchange.

    Args:
        tensors: Each ``[batch, seq / P, heads, head_dim]``; heads (a multiple of P) and head_dim may differ.
        group: The ranks that share the sequence.

    Returns:
        Each ``[batch, seq, heads / P, head_dim]``; views of one buffer where ``batch`` is 1.
    """
    return list(_SeqToHeads.apply(group, *tensors))


def gather_heads_scatter_seq(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Give each rank all heads of its share of the positions: the way back.

    Args:
        tensor: ``[batch, seq, heads / P, head_dim]``; seq a multiple of P.
        group: The ranks that share the sequence.

    Returns:
        ``[batch, seq / P, heads, head_dim]``.
    """
    result: Tensor = _HeadsToSeq.apply(group, tensor)
    return result


def pad_to_multiple(tensor: Tensor, multiple: int, *, dim: int, value: float) -> Tensor:
    """Append ``value`` along ``dim`` until its size is a multiple of ``multiple``."""
    missing = -tensor.shape[dim] % multiple
    if not missing:
        return tensor
    after = tensor.dim() - 1 - dim % tensor.dim()
    return F.pad(tensor, [0, 0] * after + [0, missing], value=value)


def slice_sequence(tensor: Tensor, group: ProcessGroup, *, dim: int) -> Tensor:
    """Return this rank's part of what all ranks of the group hold whole; the gradient is whole on every rank again."""
    result: Tensor = _Slice.apply(group, tensor, dim)
    return result


def gather_sequence(tensor: Tensor, group: ProcessGroup, *, dim: int) -> Tensor:
    """Return all ranks' parts in order; the gradient of a part is the sum over what all ranks did with it."""
    result: Tensor = _Gather.apply(group, tensor, dim)
    return result


def _send_heads(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """``[batch, seq / P, heads, head_dim]`` to ``[batch, seq, heads / P, head_dim]``."""
    size = group.size()
    batch, local = tensors[0].shape[:2]
    parts = [tensor.unflatten(2, (size, -1)).permute(2, 0, 1, 3, 4) for tensor in tensors]
    widths = [part.shape[3] * part.shape[4] for part in parts]
    buffer = tensors[0].new_empty(size, batch, local, sum(widths))
    for part, room in zip(parts, buffer.split(widths, dim=-1), strict=True):
        room.unflatten(-1, part.shape[3:]).copy_(part)
    rows = all_to_all(buffer, None, group).transpose(0, 1).reshape(batch, size * local, -1)
    return [room.unflatten(-1, part.shape[3:]) for part, room in zip(parts, rows.split(widths, dim=-1), strict=True)]


def _send_rows(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """``[batch, seq, heads / P, head_dim]`` to ``[batch, seq / P, heads, head_dim]``."""
    size = group.size()
    batch, total = tensors[0].shape[:2]
    widths = [tensor.shape[2] * tensor.shape[3] for tensor in tensors]
    if len(tensors) == 1:
        rows = tensors[0].flatten(2)
    else:
        rows = tensors[0].new_empty(batch, total, sum(widths))
        for tensor, room in zip(tensors, rows.split(widths, dim=-1), strict=True):
            room.unflatten(-1, tensor.shape[2:]).copy_(tensor)
    buffer = rows.unflatten(1, (size, -1)).transpose(0, 1).contiguous()
    received = all_to_all(buffer, None, group).permute(1, 2, 0, 3)
    return [
        room.unflatten(-1, tensor.shape[2:]).flatten(2, 3)
        for tensor, room in zip(tensors, received.split(widths, dim=-1), strict=True)
    ]


class _SeqToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(_send_heads(tensors, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_send_rows(grads, ctx.group)


class _HeadsToSeq(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, tensor: Tensor) -> Tensor:
        ctx.group = group
        return _send_rows([tensor], group)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_send_heads(grads, ctx.group)


def _gathered(tensor: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    parts = tensor.new_empty(group.size(), *tensor.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), tensor.contiguous(), group=group)
    return torch.cat(parts.unbind(), dim=dim)


def _own(tensor: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    return tensor.chunk(group.size(), dim=dim)[group.rank()]


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, tensor: Tensor, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _own(tensor, group, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, _gathered(grads[0], ctx.group, ctx.dim), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, tensor: Tensor, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gathered(tensor, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole = grads[0].contiguous()
        dist.all_reduce(whole, group=ctx.group)
        return None, _own(whole, ctx.group, ctx.dim).contiguous(), None
