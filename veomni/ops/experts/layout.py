"""How a transformers experts module stores its weights, and which activation it computes."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from veomni.models.transformers_api.experts import apply_gate
from veomni.ops.experts.activation import SwiGLU, swiglu
from veomni.parallel.wrappers import local_shard

ACTIVATION = "_veomni_expert_activation"
"""The attribute of an experts module in which its activation may be kept."""


def holds_experts(module: nn.Module) -> bool:
    """Return whether a module holds the experts of a layer, as transformers' experts interface has them."""
    return all(hasattr(module, name) for name in ("num_experts", "has_gate", "has_bias", "is_transposed"))


def products(module: nn.Module) -> tuple[str, str]:
    """Return the parameters of the two products; the first gives a gate and an up projection, or only the latter."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def local_weights(module: nn.Module, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return this rank's matrices as ``[local_experts, in, out]``, and biases as ``[local_experts, out]`` or None."""
    matrices = local_shard(getattr(module, name)).to(dtype)
    bias = local_shard(getattr(module, f"{name}_bias")).to(dtype) if module.has_bias else None
    return matrices if module.is_transposed else matrices.transpose(1, 2), bias


def activation_of(module: nn.Module) -> SwiGLU | None:
    """Return the activation that a module keeps in :data:`ACTIVATION`, or :func:`find_activation` of it."""
    return getattr(module, ACTIVATION) if hasattr(module, ACTIVATION) else find_activation(module)


def find_activation(module: nn.Module) -> SwiGLU | None:
    """Return which SwiGLU a module's gating computes; None for another activation: the module is called for that.

    A candidate counts only if it gives what the module's own function gives, inside and far outside of every limit.
    """
    act_fn = getattr(module, "act_fn", None)
    if not module.has_gate or (isinstance(act_fn, nn.Module) and any(True for _ in act_fn.parameters())):
        return None
    limits = [math.inf, *_numbers(module, "limit", "swiglu_limit")]
    alphas = [1.0, *_numbers(module, "alpha", "swiglu_alpha")]
    probe = _probe([limit for limit in limits if math.isfinite(limit)])
    with torch.no_grad():
        expected = apply_gate(module, probe).double()
        for limit, alpha, shift in itertools.product(limits, alphas, (0.0, 1.0)):
            form = SwiGLU(alpha, limit, shift, not module.is_concatenated)
            if torch.allclose(swiglu(probe, form), expected, rtol=1e-5, atol=1e-6):
                return form
    return None


def _numbers(module: Any, *names: str) -> list[float]:
    return [float(value) for name in names if isinstance(value := getattr(module, name, None), int | float)]


def _probe(limits: list[float]) -> Tensor:
    positive = torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0, 20.0, 1e2, 1e4, *(2 * limit for limit in limits)])
    values = torch.cat([-positive.flip(0), positive]).double()
    # Every gate meets every up, in whichever way the two are laid out.
    return torch.cartesian_prod(values, values).reshape(1, -1)
