"""The gated activation between an expert's two products, and its gradient, computed in float32 or better."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SwiGLU:
    """``(clamp(up) + shift) * gate * sigmoid(alpha * gate)``, where ``gate`` is at most ``limit``.

    The defaults are SwiGLU (Shazeer, 2020, arXiv:2002.05202); gpt_oss clamps and shifts.

    Attributes:
        alpha: Slope of the sigmoid.
        limit: Largest gate, and largest magnitude of ``up``.
        shift: Added to ``up``.
        interleaved: Whether gates and ups take turns, ``[gate0, up0, gate1, ...]``; otherwise all gates come first.
    """

    alpha: float = 1.0
    limit: float = math.inf
    shift: float = 0.0
    interleaved: bool = False


def split(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return views of the gates and the ups, ``[rows, intermediate]`` each."""
    if interleaved:
        return gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up


def swiglu(gate_up: Tensor, form: SwiGLU, scale: Tensor | None = None) -> Tensor:
    """Return the activation, ``[rows, intermediate]``.

    Args:
        gate_up: ``[rows, 2 * intermediate]``.
        form: Which activation.
        scale: A factor for each row, ``[rows]``, or None.
    """
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = split(gate_up.to(wide), form.interleaved)
    gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    result = (up + form.shift) * gate * torch.sigmoid(form.alpha * gate)
    return (result if scale is None else result * scale.to(wide)[:, None]).to(gate_up.dtype)


def swiglu_backward(
    gate_up: Tensor, grad: Tensor, form: SwiGLU, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradient of ``gate_up``, the activation once more, and the gradient of ``scale``.

    Args:
        gate_up: ``[rows, 2 * intermediate]``.
        grad: Gradient of the activation, ``[rows, intermediate]``.
        form: Which activation.
        scale: As in :func:`swiglu`.
    """
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = split(gate_up.to(wide), form.interleaved)
    grad = grad.to(wide)
    bounded, shifted = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit) + form.shift
    slope = torch.sigmoid(form.alpha * bounded)
    glu = bounded * slope
    grad_scale = None
    result = shifted * glu
    if scale is not None:
        grad_scale = (grad * result).sum(1).to(scale.dtype)
        grad, result = grad * scale.to(wide)[:, None], result * scale.to(wide)[:, None]
    to_gate = grad * shifted * (slope + form.alpha * glu * (1 - slope)) * (gate <= form.limit)
    to_up = grad * glu * (up.abs() <= form.limit)
    grad_gate_up = torch.empty_like(gate_up)
    for target, value in zip(split(grad_gate_up, form.interleaved), (to_gate, to_up), strict=True):
        target.copy_(value)
    return grad_gate_up, result.to(gate_up.dtype), grad_scale
