"""Where a model's weights come from, remembered on the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

_ATTRIBUTE = "veomni_weight_source"


@dataclass(frozen=True)
class WeightSource:
    """Origin of a model's weights.

    Attributes:
        directory: Holds the safetensors; None for random initialisation.
    """

    directory: Path | None


def set_weight_source(model: nn.Module, source: WeightSource) -> None:
    """Remember on the model where its weights are to come from."""
    setattr(model, _ATTRIBUTE, source)


def weight_source(model: nn.Module) -> Path | None:
    """Return the directory with the model's safetensors, or None when it starts from random weights."""
    source = getattr(model, _ATTRIBUTE, None)
    return source.directory if source is not None else None
