"""A mode that sees every operation below autograd."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

from veomni.compat.private_name import PrivateName

PRIVATE = (
    PrivateName(
        "torch.utils._python_dispatch:TorchDispatchMode",
        reason="keeps float64 where modeling code names float32; records what a constructor writes on meta tensors",
        without="fp64 runs and initialization by tracing are not possible",
    ),
)
__all__ = ["TorchDispatchMode"]
