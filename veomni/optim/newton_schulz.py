"""The nearest orthogonal matrix, approximately, with matrix products alone."""

from __future__ import annotations

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315
_SMALLEST_NORM = 1e-7


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Push all singular values of every matrix towards 1, and keep its singular vectors.

    Each matrix is divided by its Frobenius norm, then ``X <- a X + (b A + c A A) X`` with ``A = X X^T`` is repeated,
    which maps every singular value ``s`` to ``a s + b s^3 + c s^5``. The coefficients are Jordan's
    (https://kellerjordan.github.io/posts/muon/): five steps bring values from 0.003 up to between 0.68 and 1.21. A
    matrix of zeros stays one.

    Args:
        matrices: ``[batch, rows, columns]``, in the format to compute in.
        steps: Repetitions.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


def newton_schulz_flops(rows: int, columns: int) -> int:
    """Return what a step costs, up to a factor: three products, one of squares of the shorter side."""
    short, long = min(rows, columns), max(rows, columns)
    return short * short * (2 * long + short)
