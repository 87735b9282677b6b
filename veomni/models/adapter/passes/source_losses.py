"""The loss of each source of a mixture, summed while the loss of all is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from veomni.batch.fields import IGNORE_INDEX


class SourceLosses:
    """Sums the losses of a micro-batch's tokens by their source.

    Args:
        ids: Source of every token, int64 ``[batch, seq]``, negative in padding; on the device of the loss.
        sources: Number of sources.

    Attributes:
        sums: Summed losses, each times its token's weight, and summed weights; ``[2, sources]``, in the losses' dtype.
    """

    def __init__(self, ids: Tensor, sources: int) -> None:
        self._ids = ids.flatten().clamp(min=0)  # padding has no source, nor a target
        self.sums = torch.zeros(2, sources, device=ids.device)

    def add(self, losses: Tensor, targets: Tensor, token_weights: Tensor | None = None) -> None:
        """Add the losses of a micro-batch.

        Args:
            losses: ``[tokens]``; zero where there is no target.
            targets: ``[tokens]``, int64, ``IGNORE_INDEX`` where no loss is taken.
            token_weights: ``[tokens]``, in the losses' dtype; None weighs every token 1.
        """
        kept = (targets != IGNORE_INDEX).to(losses.dtype)
        if token_weights is not None:
            kept, losses = kept * token_weights, losses * token_weights
        self.sums = self.sums.to(losses.dtype).index_add(1, self._ids, torch.stack([losses, kept]))
