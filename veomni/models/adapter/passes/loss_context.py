"""What the loss of a micro-batch depends on beside the labels, which are all that a model passes on to it."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from veomni.batch.fields import shift_left
from veomni.batch.micro_batch import MicroBatch


@dataclass
class Predictions:
    """For counting right answers, int64 ``[tokens]``: the likeliest token, and the one that follows.

    A target is ``IGNORE_INDEX`` where no loss is taken.
    """

    tokens: Tensor
    targets: Tensor


@dataclass
class LossContext:
    """The context of one micro-batch's loss, on its device.

    Attributes:
        token_weights: Weight of each token's loss, ``[batch, seq]``, aligned with the shifted labels; None weighs every
            supervised token 1.
        source_ids: Source of every token in a mixture, int64 ``[tokens]``; None for other data.
        source_sums: By source, summed losses, each times its token's weight, and summed weights; ``[2, sources]``, in
            the dtype of the losses.
        predicts: Whether the loss sets :attr:`predictions`.
        predictions: What was predicted.
    """

    token_weights: Tensor | None = None
    source_ids: Tensor | None = None
    source_sums: Tensor | None = None
    predicts: bool = False
    predictions: Predictions | None = None

    @classmethod
    def of(cls, micro: MicroBatch) -> Self:
        """Return the context of a micro-batch that is on the device of the loss."""
        context, targets = cls(), micro.targets
        if targets.loss_weights is not None:
            shifted = "shift_labels" in micro.inputs
            context.token_weights = targets.loss_weights if shifted else shift_left(targets.loss_weights, 1.0)
        if targets.source_ids is not None:
            context.source_ids = targets.source_ids.flatten().clamp(min=0)  # padding has no source, nor a target
            context.source_sums = torch.zeros(2, len(micro.origin.source_names), device=targets.source_ids.device)
        return context

    def add_by_source(self, losses: Tensor, kept: Tensor, token_weights: Tensor | None) -> None:
        """Add the losses of tokens, zero where none is ``kept`` as a target, to those of their sources."""
        assert self.source_ids is not None
        assert self.source_sums is not None
        weights = kept.to(losses.dtype)
        if token_weights is not None:
            weights, losses = weights * token_weights, losses * token_weights
        sums = self.source_sums.to(losses.dtype)
        self.source_sums = sums.index_add(1, self.source_ids, torch.stack([losses, weights]))
