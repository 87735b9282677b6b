"""Text and JSON files as records, read lazily."""

import json
import mmap
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veomni.data.sources.blocks import Blocks, Records
from veomni.data.sources.locations import DataFile
from veomni.data.sources.records import Document
from veomni.data.sources.schema import RecordSchema
from veomni.errors import DataError

RANGE_BYTES = 1 << 22  # bytes of JSONL in a block
_CHUNK = 1 << 26


def text_file(file: DataFile, schema: RecordSchema) -> Records:
    """Return a file of plain text as one record."""
    return Records(1, lambda _: Document({schema.text_key: decode(file.content(), str(file))}, str(file)))


def json_array(file: DataFile, schema: RecordSchema) -> Records:
    """Return a list of JSON objects; read whole (DataError: it is not JSON, or no list)."""
    try:
        found = json.loads(decode(file.content(), str(file)))
    except json.JSONDecodeError as error:
        problem = f"{file}, line {error.lineno}: not JSON: {error.msg}"
        raise DataError(problem, "fix the file; name it .jsonl if it holds one object per line") from error
    if not isinstance(found, list):
        raise DataError(f"{file}: does not hold a list of records", "write a list of objects, or JSONL")

    def read(index: int) -> Document:
        where = f"{file}, record {index + 1}"
        return Document(_fields(found[index], where), where)

    return Records(len(found), read)


def json_lines(file: DataFile, schema: RecordSchema) -> Records:
    """Return a file on this machine with one JSON object per line: memory-mapped, indexed; blank lines are skipped."""
    data: mmap.mmap | bytes = b""
    if file.size:  # an empty file cannot be mapped
        with file.open() as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    ends = _line_ends(data)
    starts = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])
    # No record is shorter than four bytes and its newline, so only such lines can be blank or nearly so.
    short = np.flatnonzero(ends - starts <= 4)
    lines = np.delete(np.arange(len(ends)), [line for line in short if not data[starts[line] : ends[line]].strip()])

    def read(index: int) -> Document:
        line = int(lines[index])
        return _line(data[starts[line] : ends[line]], f"{file}, line {line + 1}")

    return Records(len(lines), read)


def _line_ends(data: mmap.mmap | bytes) -> NDArray[np.int64]:
    size = len(data)
    ends = [
        np.flatnonzero(np.frombuffer(data[start : start + _CHUNK], np.uint8) == ord("\n")) + (start + 1)
        for start in range(0, size, _CHUNK)
    ]
    if size and data[size - 1] != ord("\n"):
        ends.append(np.array([size]))
    return np.concatenate([np.zeros(0, np.int64), *ends]).astype(np.int64)


def json_ranges(file: DataFile, schema: RecordSchema) -> Blocks:
    """Return JSONL in ranges of bytes, wherever it lies: a block holds the lines that begin in it."""
    return Blocks(-(-file.size // RANGE_BYTES), partial(_range, file))


def _range(file: DataFile, block: int) -> Records:
    start = block * RANGE_BYTES
    found: list[tuple[int, bytes]] = []
    with file.open() as opened:
        opened.seek(max(0, start - 1))
        at = start - 1 + len(opened.readline()) if start else 0  # behind the end of a line that began before
        while at < start + RANGE_BYTES and (line := opened.readline()):
            if line.strip():
                found.append((at, line))
            at += len(line)
    return Records(len(found), lambda index: _line(found[index][1], f"{file}, byte {found[index][0]}"))


def _line(line: bytes, where: str) -> Document:
    return Document(json_object(line, where), where)


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """Return JSON as the fields of a record (DataError: it is not UTF-8, not JSON, or no object)."""
    try:
        return _fields(json.loads(decode(data, where)), where)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} (character {error.pos + 1})", "fix or remove it") from error


def _fields(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}, not an object", "write one JSON object per record")
    return record


def decode(data: bytes, where: str) -> str:
    """Return UTF-8 as text, without a byte order mark (DataError: it is not UTF-8)."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fix = "convert the file to UTF-8, or leave it out"
        raise DataError(f"{where}: byte {error.start} is not UTF-8", fix) from error
