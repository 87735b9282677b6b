"""Where a model's weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class WeightSource:
    """Origin of a model's weights.

    Attributes:
        directory: Holds the safetensors; None for random initialisation.
        parts: Of a composed model, the names of parts to directories with their safetensors; the rest is random.
    """

    directory: Path | None = None
    parts: Mapping[str, Path] = field(default_factory=dict)
