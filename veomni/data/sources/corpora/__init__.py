"""Data that needs no download, by a name that is written in place of a path: what the examples train on."""

import base64
import json
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from veomni.data.sources.cache import build_once, lacks
from veomni.data.sources.corpora.handwritten_digits import digit_drawings, handwritten_digits
from veomni.data.sources.corpora.keypad_tones import keypad_tones
from veomni.data.sources.corpora.number_words import number_words

PYTHON_STDLIB = "python-stdlib"
# Packages of others, and files that are tests: some of those are not UTF-8 or not Python on purpose.
_OTHERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
# Tables in Python's syntax: a fifth of all bytes, far easier to predict than code, and clustered in few directories.
_TABLES = {"encodings", "pydoc_data", "_compat_pickle.py", "entities.py", "locale.py", "stringprep.py"}
_GENERATED = "_sysconfigdata"

Turn = tuple[Any, Any, dict[str, bytes]]
"""A question, its answer, and the content of media by the field of the record that lists them."""

_MADE: dict[str, Callable[[str], Iterator[Turn]]] = {
    "handwritten-digits": handwritten_digits, "digit-drawings": digit_drawings, "keypad-tones": keypad_tones,
    "number-words": number_words,
}  # fmt: skip
_FORMAT = 1  # to be raised when what is made changes: it is kept under this number
_RECORDS = "records.jsonl"
CORPORA = (PYTHON_STDLIB, *(f"{name}-{part}" for name in _MADE for part in ("train", "test")))
"""Names of all built-in data."""


def corpus_files(name: str, cache_dir: Path) -> list[Path]:
    """Return the files of one of :data:`CORPORA`; conversations are written once, with their media inside as base64.

    MissingExtraError where a package that the data is made with is not installed.
    """
    if name == PYTHON_STDLIB:
        return python_stdlib_files()
    kind, _, part = name.rpartition("-")
    directory = cache_dir / "corpora" / str(_FORMAT) / name

    def build(empty: Path) -> None:
        lines = (json.dumps(_record(*turn), ensure_ascii=False) for turn in _MADE[kind](part))
        (empty / _RECORDS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    build_once(directory, build, lacks(_RECORDS))
    return [directory / _RECORDS]


def python_stdlib_files() -> list[Path]:
    """Return the ``.py`` files of the standard library that are code, sorted by their path inside it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root): path for path in root.rglob("*.py") if not path.name.startswith(_GENERATED)}
    code = (name for name in files if not (_OTHERS | _TABLES).intersection(name.parts))
    return [files[name] for name in sorted(code, key=Path.as_posix)]


def _record(question: Any, answer: Any, media: dict[str, bytes]) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    held = {field: [{"base64": base64.b64encode(content).decode()}] for field, content in media.items()}
    return {"messages": messages, **held}
