"""What the loss is told about a micro-batch beside the labels, which are all that a model passes on to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veomni.batch.micro_batch import LOSS_WEIGHTS, SOURCE_IDS, PackedInputs
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
    def of(cls, inputs: Mapping[str, Any], device: torch.device) -> LossContext:
        """Return what a micro-batch, or this rank's part of it, tells the loss.

        Args:
            inputs: As ``veomni/batch/micro_batch.py`` describes it.
            device: Where the loss is computed.
        """
        context = cls()
        weights = inputs.get(LOSS_WEIGHTS)
        if weights is not None:
            shifted = weights if "shift_labels" in inputs else shift_left(weights, 1.0)
            context.token_weights = shifted.to(device, non_blocking=True)
        if SOURCE_IDS in inputs:
            assert isinstance(inputs, PackedInputs)
            ids = inputs[SOURCE_IDS].to(device, non_blocking=True)
            context.by_source = SourceLosses(ids, len(inputs.source_names))
        return context
