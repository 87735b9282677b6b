"""The gated activation between an expert's two products, and its gradient, computed in float32 or better."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from veomni.ops.experts.permute import Routing, by_pair, expert_of_row, has_kernels, past_end
from veomni.parallel.wrappers import wide_dtype


class SwiGLU(NamedTuple):
    """``(clamp(up) + shift) * gate * sigmoid(alpha * gate)``; gate and the magnitude of ``up`` are at most ``limit``.

    The defaults are SwiGLU (Shazeer, 2020, arXiv:2002.05202); gpt_oss clamps and shifts. With
    ``interleaved``, gate and up channels alternate, ``[gate0, up0, gate1, ...]``; otherwise all gates come first.
    """

    alpha: float = 1.0
    limit: float = math.inf
    shift: float = 0.0
    interleaved: bool = False


def activate(gate_up: Tensor, bias: Tensor | None, weights: Tensor, rows: Routing, form: SwiGLU) -> Tensor:
    """Return the activation of ``[rows, 2 * intermediate]``, ``[rows, intermediate]``. Has no gradient.

    Each expert's ``bias`` of ``[experts, 2 * intermediate]`` is added to its rows first, and each result is multiplied
    by the routing weight of its pair, of ``weights`` ``[tokens, k]``.
    """
    if has_kernels(gate_up):
        from veomni.ops.experts import activation_triton

        experts = None if bias is None else expert_of_row(gate_up, rows.offsets)
        return activation_triton.swiglu(gate_up, bias, experts, weights, rows.order, form)
    return swiglu(_biased(gate_up, bias, rows), form, _scale(weights, rows))


def activate_backward(
    grad: Tensor, gate_up: Tensor, bias: Tensor | None, weights: Tensor, rows: Routing, form: SwiGLU
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of ``gate_up``, the recomputed activation, and the gradient of ``weights``.

    ``grad``, ``[rows, intermediate]``, is the gradient of the activation; the other arguments are those of
    :func:`activate`.
    """
    if has_kernels(gate_up):
        from veomni.ops.experts import activation_triton

        experts = None if bias is None else expert_of_row(gate_up, rows.offsets)
        return activation_triton.swiglu_backward(grad, gate_up, bias, experts, weights, rows, form)
    scale = _scale(weights, rows)
    to_gate_up, result, to_scale = _swiglu_backward(grad, _biased(gate_up, bias, rows), form, scale)
    to_scale = to_scale.masked_fill(past_end(to_scale, rows.offsets)[:, 0], 0)
    return to_gate_up, result, by_pair(to_scale, rows.order, weights)


def _biased(gate_up: Tensor, bias: Tensor | None, rows: Routing) -> Tensor:
    return gate_up if bias is None else gate_up + bias.index_select(0, expert_of_row(gate_up, rows.offsets))


def _scale(weights: Tensor, rows: Routing) -> Tensor:
    return weights.flatten().index_select(0, rows.order)


def _split(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up


def swiglu(gate_up: Tensor, form: SwiGLU, scale: Tensor | None = None) -> Tensor:
    """Return the activation of ``[rows, 2 * intermediate]``, each row multiplied by ``scale``, ``[rows]``."""
    wide = wide_dtype(gate_up.dtype)
    gate, up = _split(gate_up.to(wide), form.interleaved)
    gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    result = (up + form.shift) * gate * torch.sigmoid(form.alpha * gate)
    return (result if scale is None else result * scale.to(wide)[:, None]).to(gate_up.dtype)


def _swiglu_backward(grad: Tensor, gate_up: Tensor, form: SwiGLU, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of ``gate_up``, the recomputed activation, and the wide gradient of ``scale``."""
    wide = wide_dtype(gate_up.dtype)
    gate, up = _split(gate_up.to(wide), form.interleaved)
    grad, factor = grad.to(wide), scale.to(wide)[:, None]
    bounded, shifted = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit) + form.shift
    slope = torch.sigmoid(form.alpha * bounded)
    glu = bounded * slope
    result = shifted * glu
    to_scale = (grad * result).sum(1)
    grad, result = grad * factor, result * factor
    grad_gate_up = torch.empty_like(gate_up)
    to_gate, to_up = _split(grad_gate_up, form.interleaved)
    to_gate.copy_(grad * shifted * (slope + form.alpha * glu * (1 - slope)) * (gate <= form.limit))
    to_up.copy_(grad * glu * (up.abs() <= form.limit))
    return grad_gate_up, result.to(gate_up.dtype), to_scale
