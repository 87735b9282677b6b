"""``metrics.jsonl``: a line of JSON per step, complete on disk as soon as the step is."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from typing_extensions import override

from veomni.loggers.base import Logger, Metrics
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
        self._file: TextIO | None = None

    @override
    def log(self, metrics: Metrics, step: int) -> None:
        line = {"step": step, **dict.fromkeys(STEP_KEYS), **metrics}
        finite = {key: self._finite(key, value) for key, value in line.items()}
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._drop_torn_line()
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    @override
    def truncate_after(self, step: int) -> None:
        """Drop the lines past ``step``; the file is replaced at once or not at all."""
        if not self.path.exists():
            return
        self.finalize("truncated")
        kept = [line for line in self._whole_lines() if self._step_of(line) <= step]
        new = self.path.with_suffix(".jsonl.tmp")
        with new.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)

    @override
    def finalize(self, status: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _finite(self, key: str, value: float | int | None) -> float | int | None:
        if isinstance(value, float) and not math.isfinite(value):
            logger.warning_once("metrics.jsonl: values of %s that are not finite are written as null", key)
            return None
        return value

    def _drop_torn_line(self) -> None:
        """Cut off what a killed process left of a line, so that the next one does not continue it."""
        if self.path.exists():
            os.truncate(self.path, sum(len(line) for line in self._whole_lines()))

    def _whole_lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))

    def _step_of(self, line: bytes) -> float:
        """Return a line's step; a line that has none belongs to no step and is past all of them."""
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            logger.warning_rank0("%s: dropped a line that is not one of a step: %.80r", self.path, line)
            return math.inf
