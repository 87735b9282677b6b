"""Files with a line of JSON per step, complete on disk as soon as the step is, and cut back when a run resumes."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from typing_extensions import override

from veomni.loggers.base import Logger, Metrics
from veomni.logging import create_logger

logger = create_logger(__name__)

STEP_KEYS = (
    "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds", "mfu_causal", "mfu_full",
    "peak_memory_gib",
)  # fmt: skip
"""The keys of every line of ``metrics.jsonl`` after ``step``, in this order; null where not measured."""


class JsonlLogger(Logger):
    """Append a line per step to ``<output_dir>/metrics.jsonl``, and loads of experts to ``expert_load.jsonl``.

    Floats are written with all their digits (reading gives the same bits); numbers that are not finite, which JSON
    does not have, are written as null, with one warning per key. The directory is made with the first line.
    """

    name = "jsonl"
    essential = True

    def __init__(self, output_dir: Path | str) -> None:
        self.path = Path(output_dir) / "metrics.jsonl"
        self._metrics, self._expert_load = _Lines(self.path), _Lines(self.path.with_name("expert_load.jsonl"))

    @override
    def log(self, metrics: Metrics, step: int) -> None:
        line = {"step": step, **dict.fromkeys(STEP_KEYS), **metrics}
        self._metrics.append({key: self._finite(key, value) for key, value in line.items()})

    @override
    def log_expert_load(self, tokens: Mapping[str, Sequence[int]], step: int) -> None:
        self._expert_load.append({"step": step, "tokens_per_expert": tokens})

    @override
    def truncate_after(self, step: int) -> None:
        self._metrics.truncate_after(step)
        self._expert_load.truncate_after(step)

    @override
    def finalize(self, status: str) -> None:
        self._metrics.close()
        self._expert_load.close()

    def _finite(self, key: str, value: float | int | None) -> float | int | None:
        if isinstance(value, float) and not math.isfinite(value):
            logger.warning_once("metrics.jsonl: values of %s that are not finite are written as null", key)
            return None
        return value


class _Lines:
    """A file of lines that each hold their ``step``; it and its directory are made when the first one is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def append(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():  # a killed process may have left part of a line, which must not be continued
                os.truncate(self._path, sum(len(line) for line in self._whole_lines()))
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drop the lines past ``step``; the file is replaced at once or not at all."""
        if not self._path.exists():
            return
        self.close()
        new = self._path.with_suffix(".jsonl.tmp")
        kept = [line for line in self._whole_lines() if self._step_of(line) <= step]
        with new.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _whole_lines(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))

    def _step_of(self, line: bytes) -> float:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            logger.warning_rank0("%s: dropped a line that is not one of a step: %.80r", self._path, line)
            return math.inf
