"""What the loss of a micro-batch depends on beside the labels, which are all that a model passes on to it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from veomni.batch.micro_batch import MicroBatch
from veomni.batch.shift import shift_left
from veomni.models.adapter.passes.source_losses import SourceLosses


@dataclass
class Predictions:
    """What was predicted for each token, for counting right answers.

    Attributes:
        tokens: The likeliest token, int64 ``[tokens]``.
        targets: The token that follows, ``IGNORE_INDEX`` where no loss is taken; int64 ``[tokens]``.
    """

    tokens: Tensor
    targets: Tensor


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
        context = cls()
        weights = micro.targets.loss_weights
        if weights is not None:
            context.token_weights = weights if "shift_labels" in micro.inputs else shift_left(weights, 1.0)
        if micro.targets.source_ids is not None:
            context.by_source = SourceLosses(micro.targets.source_ids, len(micro.origin.source_names))
        return context
