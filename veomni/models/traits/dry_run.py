"""The first forward of a model with the attention that was installed for shards of rows: what it rejects shows now."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veomni.errors import ModelError
from veomni.models.traits.inputs import LENGTH
from veomni.models.traits.rows import SplitsRows
from veomni.models.traits.trial import Trial
from veomni.models.traits.verdict import Verdict
from veomni.models.transformers_api.attention import text_attention_of


def dry_run(model: nn.Module, body: Any, size: int, device: torch.device) -> None:
    """Run one row of a sharded model; collective.

    Args:
        model: What users call; its parameters have values.
        body: The transformers model inside.
        size: Ranks that share a row.
        device: Where the model computes.

    Raises:
        ModelError: the attention or the model rejects the row.
    """
    trial = Trial(body, itself=(model, device))

    def run(trial: Trial) -> Verdict:
        tokens, _ = trial.tokens()
        try:
            trial.outputs(tokens, torch.arange(LENGTH, device=device), shards=size)
        except ModelError as error:
            return Verdict(False, found=error)
        return Verdict(True)

    name = f"{trial.name} with attention {text_attention_of(body)}"
    verdict = trial.attempt(run, f"{name} does not run on shards of rows")
    if not verdict.ok:
        raise verdict.found or ModelError(verdict.reason, SplitsRows.fix)
