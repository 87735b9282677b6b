"""Files as sequences of documents, read lazily: text, JSONL, JSON, Parquet, Arrow, saved Hugging Face datasets."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from veomni.data.sources.records import Document
from veomni.errors import DataError, MissingExtraError

_CHUNK = 1 << 26


class Source(Protocol):
    """A sequence of documents, and the files it is made of."""

    @property
    def files(self) -> Sequence[Path]:
        """What is hashed to detect that the data changed."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


class TextFiles:
    """Plain text, one document per file.

    Args:
        files: The files, in order.
        key: The field that the text is put in.
    """

    def __init__(self, files: Sequence[Path], key: str) -> None:
        self.files, self.key = files, key

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Document:
        path = self.files[index]
        return Document({self.key: decode(path.read_bytes(), str(path))}, str(path))


class JsonLines:
    """One JSON object per line; blank lines are skipped. The file is memory-mapped and indexed by line.

    Args:
        path: The file.
        name: What messages call it; None for its path.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.files, self.name = (path,), name or str(path)
        with path.open("rb") as file:
            self._bytes: mmap.mmap | bytes = b""
            if path.stat().st_size:  # an empty file cannot be mapped
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        ends = _line_ends(self._bytes)
        starts = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])
        # No record is shorter than four bytes and its newline, so only such lines can be blank or nearly so.
        short = np.flatnonzero(ends - starts <= 4)
        blank = [line for line in short if not self._bytes[starts[line] : ends[line]].strip()]
        self._lines = np.delete(np.arange(len(ends)), blank)
        self._starts, self._ends = starts, ends

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Document:
        line = int(self._lines[index])
        where = f"{self.name}, line {line + 1}"
        return parse_line(self._bytes[self._starts[line] : self._ends[line]], where)


class JsonArray:
    """A JSON file holding a list of objects; read whole."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.files, self.name = (path,), name or str(path)
        try:
            self._records = json.loads(decode(path.read_bytes(), self.name))
        except json.JSONDecodeError as error:
            problem = f"{self.name}, line {error.lineno}: not JSON: {error.msg}"
            raise DataError(problem, "fix the file; name it .jsonl if it holds one object per line") from error
        if not isinstance(self._records, list):
            raise DataError(f"{self.name}: does not hold a list of records", "write a list of objects, or JSONL")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Document:
        return _document(self._records[index], f"{self.name}, record {index + 1}")


class ParquetFile:
    """A Parquet file, one row group in memory at a time.

    Args:
        path: The file.
        keys: The columns to read, where present; if none of them is, all are, so that messages can name them.
        name: What messages call it; None for its path.
        open_: Opens the file, where it is none of this machine.

    Attributes:
        again: Opens the file once more: a handle does not survive a fork.
        offsets: The first record of each row group, and the number of records.
    """

    def __init__(
        self, path: Path | None, keys: Sequence[str], name: str | None = None, open_: Callable[[], Any] | None = None
    ) -> None:
        import pyarrow.parquet as pq

        self.files, self.name = () if path is None else (path,), name or str(path)
        self.again = partial(ParquetFile, path, keys, name, open_)
        file = opened(lambda: pq.ParquetFile(open_()) if open_ else pq.ParquetFile(path, memory_map=True), self.name)
        self._file = file
        self._columns = [key for key in keys if key in self._file.schema_arrow.names] or None
        groups = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(groups, dtype=np.int64)])
        self._group, self._table = -1, None

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, index: int) -> Document:
        group = int(np.searchsorted(self.offsets, index, side="right")) - 1
        if group != self._group:
            self._table = self.table(group)
            self._group = group
        return self.document(self._table, index - int(self.offsets[group]), group)

    def table(self, group: int) -> Any:
        """Read a row group."""
        return opened(lambda: self._file.read_row_group(group, columns=self._columns, use_threads=False), self.name)

    def document(self, table: Any, row: int, group: int) -> Document:
        """Return a record of a row group that has been read."""
        return Document(table_row(table, row), f"{self.name}, record {int(self.offsets[group]) + row + 1}")


class ArrowFile:
    """An Arrow IPC file or stream, memory-mapped: only the rows asked for are read."""

    def __init__(self, path: Path, keys: Sequence[str], name: str | None = None) -> None:
        import pyarrow as pa

        self.files, self.name = (path,), name or str(path)

        def read() -> Any:
            mapped = pa.memory_map(str(path))
            try:
                return pa.ipc.open_file(mapped).read_all()
            except pa.ArrowInvalid:
                mapped.seek(0)
                return pa.ipc.open_stream(mapped).read_all()

        table = opened(read, self.name)
        present = [key for key in keys if key in table.column_names]
        self._table = table.select(present) if present else table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> Document:
        return Document(table_row(self._table, index), f"{self.name}, record {index + 1}")


class SavedDataset:
    """A Hugging Face dataset written by ``save_to_disk``.

    Raises:
        MissingExtraError: the library `datasets` is not installed.
        DataError: the folder cannot be read, or holds several splits.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        try:
            from datasets import DatasetDict, load_from_disk
        except ImportError as error:
            raise MissingExtraError("the library datasets (pip install datasets)", "dev") from error
        dataset = opened(lambda: load_from_disk(str(path)), str(path))
        if isinstance(dataset, DatasetDict):
            splits = ", ".join(str(path / split) for split in dataset)
            raise DataError(f"{path} holds several splits", f"name one of: {splits}")
        present = [key for key in keys if key in dataset.column_names]
        self._rows = dataset.select_columns(present) if present else dataset
        self._path = path
        self.files = tuple(sorted(path.rglob("*.arrow")))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Document:
        return Document(self._rows[index], f"{self._path}, record {index + 1}")


def parse_line(line: bytes, where: str) -> Document:
    """Return a line of JSONL as a record.

    Raises:
        DataError: it is not UTF-8, not JSON, or no object.
    """
    try:
        return _document(json.loads(decode(line, where)), where)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} (column {error.colno})", "fix or remove the line") from error


def table_row(table: Any, row: int) -> dict[str, Any]:
    """Return a row of an Arrow table."""
    return {name: table.column(name)[row].as_py() for name in table.column_names}


def _document(record: Any, where: str) -> Document:
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}, not an object", "write one JSON object per record")
    return Document(record, where)


def decode(data: bytes, where: str) -> str:
    """Return UTF-8 as text, without a byte order mark.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"{where}: byte {error.start} is not UTF-8"
        raise DataError(problem, "convert the file to UTF-8, or leave it out") from error


def opened(read: Callable[[], Any], name: str) -> Any:
    """Return what ``read`` does.

    Raises:
        DataError: the file called ``name`` cannot be read.
    """
    import pyarrow as pa

    try:
        return read()
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise DataError(f"{name}: cannot be read: {error}", "the file is damaged or of another kind") from error


def _line_ends(data: mmap.mmap | bytes) -> np.ndarray[Any, np.dtype[np.int64]]:
    size = len(data)
    ends = [
        np.flatnonzero(np.frombuffer(data[start : start + _CHUNK], np.uint8) == ord("\n")) + (start + 1)
        for start in range(0, size, _CHUNK)
    ]
    if size and data[size - 1] != ord("\n"):
        ends.append(np.array([size]))
    return np.concatenate([np.zeros(0, np.int64), *ends]).astype(np.int64)
