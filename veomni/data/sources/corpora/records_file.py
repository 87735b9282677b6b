"""Conversations of a built-in corpus as one JSONL file, media inside as base64."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECORDS = "records.jsonl"


def write_records(records: Sequence[dict[str, Any]], directory: Path) -> None:
    """Write one record per line."""
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    (directory / RECORDS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def question_answer(question: str, answer: str) -> list[dict[str, str]]:
    """Return the messages of a conversation of two turns."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def inline(content: bytes) -> dict[str, str]:
    """Return a file's content as a reference that needs no file."""
    return {"base64": base64.b64encode(content).decode()}
