"""What the loss is told about a micro-batch beside the labels, which are all that a model passes on to it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from veomni.batch.micro_batch import MicroBatch
from veomni.batch.shift import shift_left
from veomni.models.adapter.passes.source_losses import SourceLosses


@dataclass
class Predictions:
    """What the loss saw of each token, for whoever counts right answers.

    Attributes:
        tokens: The likeliest token, int64 ``[tokens]``.
        targets: The token that follows, ``IGNORE_INDEX`` where no loss is taken; int64 ``[tokens]``.
    """

    tokens: Tensor
    targets: Tensor


@dataclass
class LossContext:
    """What is known of the tokens of one micro-batch, on the device of the loss.

    Attributes:
        token_weights: What the loss of each token weighs, ``[batch, seq]``, aligned with the shifted labels; None
            weighs every supervised token 1.
        by_source: Is told the loss of every token, where a mixture's sources are taken apart.
        predicts: Whether the loss keeps :attr:`predictions`.
        predictions: What the loss saw.
    """

    token_weights: Tensor | None = None
    by_source: SourceLosses | None = None
    predicts: bool = False
    predictions: Predictions | None = None

    @classmethod
    def of(cls, micro: MicroBatch) -> LossContext:
        """Return what the loss of a micro-batch, on the device of the loss, depends on beside its labels."""
        context = cls()
        weights = micro.targets.loss_weights
        if weights is not None:
            context.token_weights = weights if "shift_labels" in micro.inputs else shift_left(weights, 1.0)
        if micro.targets.source_ids is not None:
            context.by_source = SourceLosses(micro.targets.source_ids, len(micro.origin.source_names))
        return context
