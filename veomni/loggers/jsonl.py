"""``metrics.jsonl``: a line of JSON per step, complete on disk as soon as the step is."""

from __future__ import annotations

import math
from pathlib import Path

from typing_extensions import override

from veomni.loggers.base import Logger, Metrics
from veomni.loggers.json_lines import JsonLines
from veomni.logging import create_logger

logger = create_logger(__name__)

STEP_KEYS = (
    "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds", "mfu_causal", "mfu_full",
    "peak_memory_gib",
)  # fmt: skip
"""The keys of every line after ``step``, in this order; null where not measured. Other keys follow them."""


class JsonlLogger(Logger):
    """Append a line per step to ``<output_dir>/metrics.jsonl``.

    Floats are written with all their digits (reading gives the same bits); numbers that are not finite, which JSON
    does not have, are written as null, with one warning per key.

    Args:
        output_dir: Made when the first line is written.
    """

    name = "jsonl"
    essential = True

    def __init__(self, output_dir: Path | str) -> None:
        self.path = Path(output_dir) / "metrics.jsonl"
        self._lines = JsonLines(self.path)

    @override
    def log(self, metrics: Metrics, step: int) -> None:
        line = {"step": step, **dict.fromkeys(STEP_KEYS), **metrics}
        self._lines.append({key: self._finite(key, value) for key, value in line.items()})

    @override
    def truncate_after(self, step: int) -> None:
        self._lines.truncate_after(step)

    @override
    def finalize(self, status: str) -> None:
        self._lines.close()

    def _finite(self, key: str, value: float | int | None) -> float | int | None:
        if isinstance(value, float) and not math.isfinite(value):
            logger.warning_once("metrics.jsonl: values of %s that are not finite are written as null", key)
            return None
        return value
