"""What the loss of a micro-batch depends on beside the labels, which are all that a model passes on to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veomni.batch.fields import IGNORE_INDEX, shift_left
from veomni.batch.micro_batch import MicroBatch


@dataclass
class Predictions:
    """What was predicted for each token, for counting right answers.

    Attributes:
        tokens: The likeliest token, int64 ``[tokens]``.
        targets: The token that follows, ``IGNORE_INDEX`` where no loss is taken; int64 ``[tokens]``.
    """

    tokens: Tensor
    targets: Tensor


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


@dataclass
class LossContext:
    """The context of one micro-batch's loss, on its device.

    Attributes:
        token_weights: Weight of each token's loss, ``[batch, seq]``, aligned with the shifted labels; None weighs every
            supervised token 1.
        by_source: Sums the losses of a mixture's sources; None for other data.
        predicts: Whether the loss sets :attr:`predictions`.
        predictions: What was predicted.
    """

    token_weights: Tensor | None = None
    by_source: SourceLosses | None = None
    predicts: bool = False
    predictions: Predictions | None = None

    @classmethod
    def of(cls, micro: MicroBatch) -> LossContext:
        """Return the context of a micro-batch that is on the device of the loss."""
        context, targets = cls(), micro.targets
        if targets.loss_weights is not None:
            shifted = "shift_labels" in micro.inputs
            context.token_weights = targets.loss_weights if shifted else shift_left(targets.loss_weights, 1.0)
        if targets.source_ids is not None:
            context.by_source = SourceLosses(targets.source_ids, len(micro.origin.source_names))
        return context
