"""Operations on lists of tensors in one kernel launch, as PyTorch's own optimizers use them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veomni.compat.private_name import PrivateName

PRIVATE = tuple(
    PrivateName(
        f"torch:{name}",
        reason="one launch for all parameters instead of one for each",
        without="replace the call by a loop over tensors: exact, and slower on accelerators",
    )
    for name in ("_foreach_mul_", "_foreach_lerp_")
)


def multiply(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply every tensor by ``factor``, in place."""
    torch._foreach_mul_(list(tensors), factor)


def lerp(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Move every tensor towards the one of ``ends`` by ``weight`` of their difference, in place."""
    torch._foreach_lerp_(list(tensors), list(ends), weight)
