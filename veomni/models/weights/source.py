"""Where a model's weights come from, remembered on the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

_ATTRIBUTE = "veomni_weight_source"


@dataclass(frozen=True)
class WeightSource:
    """Origin of a model's weights.

    Attributes:
        directory: Holds the safetensors; None for random initialisation.
        parts: Of a composed model, the names of parts to directories with their safetensors; the rest is random.
    """

    directory: Path | None
    parts: Mapping[str, Path] = field(default_factory=dict)


def set_weight_source(model: nn.Module, source: WeightSource) -> None:
    """Remember on the model where its weights are to come from."""
    setattr(model, _ATTRIBUTE, source)


def weight_source(model: nn.Module) -> WeightSource:
    """Return where a model's weights come from; random for a module that nothing was said of."""
    source: WeightSource = getattr(model, _ATTRIBUTE, WeightSource(None))
    return source
