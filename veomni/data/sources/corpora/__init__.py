"""Data that needs no download, by a name that is written in place of a path.

Small enough to learn in minutes on a CPU: what the examples train on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from veomni.data.sources.build_once import build_once
from veomni.data.sources.corpora.handwritten_digits import digit_drawings, handwritten_digits
from veomni.data.sources.corpora.keypad_tones import keypad_tones
from veomni.data.sources.corpora.number_words import number_words
from veomni.data.sources.corpora.python_stdlib import python_stdlib_files
from veomni.data.sources.corpora.records_file import RECORDS, write_records

PYTHON_STDLIB = "python-stdlib"

_MADE: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    "handwritten-digits": handwritten_digits,
    "digit-drawings": digit_drawings,
    "keypad-tones": keypad_tones,
    "number-words": number_words,
}
_PARTS = ("train", "test")
_FORMAT = 1  # to be raised when what is made changes: it is kept under this number
CORPORA = (PYTHON_STDLIB, *(f"{name}-{part}" for name in _MADE for part in _PARTS))
"""Names of all built-in data."""


def corpus_files(name: str, cache_dir: Path) -> list[Path]:
    """Return the files of built-in data; conversations are written once, by whichever process comes first.

    Args:
        name: One of :data:`CORPORA`.
        cache_dir: Where they are kept.

    Raises:
        MissingExtraError: a package that the data is made with is not installed.
    """
    if name == PYTHON_STDLIB:
        return python_stdlib_files()
    kind, _, part = name.rpartition("-")
    directory = cache_dir / "corpora" / str(_FORMAT) / name

    def build(empty: Path) -> None:
        write_records(_MADE[kind](part), empty)

    build_once(directory, build, lambda built: None if (built / RECORDS).is_file() else f"no {RECORDS}")
    return [directory / RECORDS]
