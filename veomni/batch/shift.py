"""The shift by one between a token and the label that is predicted from it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def shift_left(values: Tensor, fill: float) -> Tensor:
    """Return ``[..., seq]`` values moved one position forward; ``fill`` takes the last place."""
    return F.pad(values, (0, 1), value=fill)[..., 1:]
