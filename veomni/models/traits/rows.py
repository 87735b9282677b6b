"""Whether a model computes on a shard of a row what it computes on the whole row.

With attention replaced by something that treats every position separately, a model in which only attention mixes
positions must treat every position separately too, and must take a token's place in the row from ``position_ids``.
Two things are tried on a short row: another token at one place must change no other place, and rotating tokens and
position ids must rotate the output. State spaces, convolutions, trained mixing, positions that the model counts,
attention that goes around transformers' interface: all of them fail one of the two.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veomni.errors import ModelError
from veomni.models.traits.attention import NO_SHARDS, POINTWISE, SHARDS, calls
from veomni.models.traits.inputs import FIRST, LENGTH, displacement, influence
from veomni.models.traits.sequence_layers import layer_outside_attention
from veomni.models.traits.trial import Trial
from veomni.models.traits.verdict import Verdict
from veomni.models.transformers_api.attention import text_attention_of
from veomni.models.transformers_api.capabilities import is_pretrained


class SplitsRows:
    """Positions meet in attention only, and attention goes through transformers' interface."""

    says: ClassVar[str] = "can be computed on shards of rows"
    fix: ClassVar[str] = NO_SHARDS

    def examine(self, trial: Trial) -> Verdict:
        """Run the model with pointwise attention."""
        if not is_pretrained(trial.subject):
            return Verdict(False, f"{trial.name} is not a transformers model, so its attention cannot be replaced")
        if not trial.takes("input_ids", "position_ids"):
            return Verdict(False, f"{trial.name} takes no position_ids")
        layer = layer_outside_attention(trial.subject)
        if layer is not None:
            return Verdict(False, f"{trial.name} has a layer that sees the sequence outside attention: {layer}")
        with trial.attention(POINTWISE):
            return trial.attempt(_examine, f"{trial.name} does not run on shards of rows")


def _examine(trial: Trial) -> Verdict:
    before = calls.get()
    positions = torch.arange(LENGTH, device=trial.device)
    tokens, other = trial.tokens()

    def run(tokens: Tensor, positions: Tensor) -> Tensor:
        return trial.outputs(tokens, positions, shards=SHARDS)

    elsewhere = (slice(FIRST, None), slice(0, FIRST - 1))
    mixed = max(influence(run, tokens, other, positions, places) for places in elsewhere)
    if calls.get() == before:
        return Verdict(False, f"the attention of {trial.name} does not go through transformers' attention interface")
    if mixed > 1:
        return Verdict(False, f"{trial.name} lets positions see each other outside attention", mixed)
    moved = displacement(run, tokens, positions)
    if moved > 1:
        return Verdict(False, f"{trial.name} does not take the place of a token from position_ids alone", moved)
    return Verdict(True, measured=max(mixed, moved))


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
        raise verdict.found or ModelError(verdict.reason, NO_SHARDS)
