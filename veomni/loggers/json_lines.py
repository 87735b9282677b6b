"""A file with a line of JSON per step, complete on disk as soon as the step is, and cut back when a run resumes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from veomni.logging import create_logger

logger = create_logger(__name__)


class JsonLines:
    """Append lines to a file; every line holds its ``step``.

    Args:
        path: The file; it and its directory are made when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._drop_torn_line()
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drop the lines past ``step``; the file is replaced at once or not at all."""
        if not self.path.exists():
            return
        self.close()
        kept = [line for line in self._whole_lines() if self._step_of(line) <= step]
        new = self.path.with_suffix(".jsonl.tmp")
        with new.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)

    def close(self) -> None:
        """Close the file; another line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

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
