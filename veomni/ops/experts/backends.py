"""Backends of the products of rows and their experts' matrices: what each can run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from veomni.errors import ModelError
from veomni.ops.experts.layout import ExpertLayout, expert_layout

HALF_ONLY = {"grouped_mm": ("cpu", "cuda"), "triton": ("cuda",), "npu": ("npu",)}
"""Backends that compute in bfloat16 only, and the accelerators that may have them."""


def choose_backend(
    modules: Sequence[nn.Module], wanted: str, available: Sequence[str], compute: torch.dtype
) -> str:  # fmt: skip
    """Return the backend for a model's experts.

    Args:
        modules: All experts modules of the model.
        wanted: A backend, or "auto" for the first available one that can run all of them.
        available: The backends of the device, fastest first.
        compute: The number format of the products.

    Raises:
        ModelError: the wanted backend cannot run here.
    """
    if wanted == "auto":
        return next(name for name in available if _why_not(modules, name, compute) is None)
    if wanted not in available:
        raise ModelError(
            f"experts {wanted} does not run on this device",
            f"set experts to auto or {' or '.join(available)}",
            field="build_model.experts",
        )
    reason = _why_not(modules, wanted, compute)
    if reason is not None:
        raise ModelError(
            f"experts {wanted} cannot run this model: {reason}",
            "set experts to auto or loop",
            field="build_model.experts",
        )
    return wanted


def _why_not(modules: Sequence[nn.Module], backend: str, compute: torch.dtype) -> str | None:
    if backend not in HALF_ONLY:
        return None
    if compute is not torch.bfloat16:
        return f"it computes in bfloat16, not in {str(compute).removeprefix('torch.')}"
    for module in modules:
        odd = [size for size in _row_sizes(module, expert_layout(module)) if size % 8]
        if odd:
            return f"its rows must be a multiple of 16 bytes, and experts have {odd[0]} channels"
    return None


def _row_sizes(module: nn.Module, layout: ExpertLayout) -> list[int]:
    return [size for name in (layout.first, "down_proj") for size in getattr(module, name).shape[1:]]
