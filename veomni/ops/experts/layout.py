"""How a transformers experts module stores its weights, and which activation it computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from veomni.models.transformers_api.experts import apply_gate
from veomni.ops.experts.activation import SwiGLU, swiglu

ACTIVATION = "_veomni_expert_activation"
"""The attribute of an experts module in which its activation may be kept."""


@dataclass(frozen=True)
class ExpertLayout:
    """What has to be known of an experts module to run it.

    Attributes:
        has_gate: Whether the first product gives a gate and an up projection; otherwise only an up projection.
        is_transposed: Whether weights are ``[experts, in, out]``; otherwise ``[experts, out, in]``.
        has_bias: Whether both products have a bias, ``[experts, out]``.
        has_post_expert_norm: Whether a norm follows the second product.
        activation: The activation, where it is a SwiGLU; None where the module has to be called for it.
        local_experts: Experts on this rank.
    """

    has_gate: bool
    is_transposed: bool
    has_bias: bool
    has_post_expert_norm: bool
    activation: SwiGLU | None
    local_experts: int

    @property
    def first(self) -> str:
        """The parameter of the first product."""
        return "gate_up_proj" if self.has_gate else "up_proj"


def holds_experts(module: nn.Module) -> bool:
    """Return whether a module holds the experts of a layer, as transformers' experts interface has them."""
    return all(hasattr(module, name) for name in ("num_experts", "has_gate", "has_bias", "is_transposed"))


def local_parameter(module: nn.Module, name: str) -> Tensor:
    """Return the part of an experts' parameter that this rank holds, ``[local_experts, ...]``."""
    parameter = getattr(module, name)
    local: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local


def expert_layout(module: nn.Module) -> ExpertLayout:
    """Read the layout off a module that :func:`holds_experts`.

    The activation is what the module keeps in :data:`ACTIVATION`, or is found by :func:`find_activation`.
    """
    experts: Any = module
    return ExpertLayout(
        has_gate=experts.has_gate,
        is_transposed=experts.is_transposed,
        has_bias=experts.has_bias,
        has_post_expert_norm=getattr(module, "has_post_expert_norm", False),  # since transformers 5.19
        activation=getattr(module, ACTIVATION) if hasattr(module, ACTIVATION) else find_activation(module),
        local_experts=local_parameter(module, "down_proj").shape[0],
    )


def find_activation(module: nn.Module) -> SwiGLU | None:
    """Return which SwiGLU a module's gating computes; None for another activation.

    The module's own function decides: a candidate counts only if it gives the same on numbers inside and far outside
    of every limit.
    """
    experts: Any = module
    act_fn = getattr(module, "act_fn", None)
    if not experts.has_gate or (isinstance(act_fn, nn.Module) and any(True for _ in act_fn.parameters())):
        return None
    limits = [math.inf, *_numbers(module, "limit", "swiglu_limit")]
    alphas = [1.0, *_numbers(module, "alpha", "swiglu_alpha")]
    probe = _probe([limit for limit in limits if math.isfinite(limit)])
    with torch.no_grad():
        expected = apply_gate(module, probe).double()
        for form in (
            SwiGLU(alpha, limit, shift, not experts.is_concatenated)
            for limit in limits
            for alpha in alphas
            for shift in (0.0, 1.0)
        ):
            if torch.allclose(swiglu(probe, form), expected, rtol=1e-5, atol=1e-6):
                return form
    return None


def _numbers(module: nn.Module, *names: str) -> list[float]:
    return [float(value) for name in names if isinstance(value := getattr(module, name, None), int | float)]


def _probe(limits: list[float]) -> Tensor:
    positive = torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0, 20.0, 1e2, 1e4, *(2 * limit for limit in limits)])
    values = torch.cat([-positive.flip(0), positive]).double()
    # Every gate meets every up, in whichever way the two are laid out.
    return torch.cartesian_prod(values, values).reshape(1, -1)
