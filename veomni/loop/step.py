"""One optimizer step: its micro-batches and what the ranks agreed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veomni.batch.micro_batch import MicroBatch


@dataclass(frozen=True)
class StepWork:
    """How much a step computes.

    Attributes:
        tokens: Tokens without padding, supervised or not.
        flops_causal: FLOPs with causal attention counted as such; 0 when they are not known.
        flops_full: FLOPs with attention counted as the whole square.
    """

    tokens: float = 0.0
    flops_causal: float = 0.0
    flops_full: float = 0.0


@dataclass
class StepBatch:
    """All micro-batches of one optimizer step on this rank, and what the ranks agreed about them.

    Attributes:
        micro_batches: This rank's share, on the CPU.
        loss_weight: The sum of its micro-batches' weights over all ranks.
        work: Everything computed in the step over all ranks.
        index: The optimizer step, counted from 1 over the whole run.
        loss: This rank's share of the global token mean, summed by ``Launcher.backward``; a 0-d tensor on the device.
        part_tokens: By part of a composed model, the tokens of the step over all ranks that its loss is the mean of.
        losses: This rank's share of each part's global mean, where ``Launcher.backward`` was given losses by part.
        source_sums: Of a mixture, the summed losses of this rank's supervised tokens, each times its weight, and summed
            weights, by source; ``[2, sources]`` on the device; None where the model takes its loss by itself.
    """

    micro_batches: Sequence[MicroBatch]
    loss_weight: float
    work: StepWork
    index: int
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    part_tokens: Mapping[str, int] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    source_sums: Tensor | None = None
