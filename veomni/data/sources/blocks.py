"""Data in blocks that can be opened in any order: what a stream reads, shuffles and distributes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from veomni.data.sources.files import ParquetFile, SavedDataset, Source, decode, parse_line
from veomni.data.sources.locations import DataFile
from veomni.data.sources.opening import FoundData, open_file
from veomni.data.sources.records import Document

RANGE_BYTES = 1 << 22  # bytes of JSONL in a block
_OPENED_TOGETHER = 16


class Records(Protocol):
    """Records by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


class LazyRecords:
    """Records that are made on access.

    Args:
        count: How many.
        read: Returns the record of an index.
    """

    def __init__(self, count: int, read: Callable[[int], Document]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Document:
        return self._read(index)


class Blocks(Protocol):
    """Records in blocks, each opened on its own.

    Attributes:
        single: Whether every block is one record; others are split further where there are few.
    """

    single: bool

    def __len__(self) -> int: ...

    def open(self, block: int) -> Records:
        """Return the records of a block."""


class SingleRecords:
    """Every record of a source is a block: cheap where a record can be read alone.

    Args:
        source: The records.
        chosen: Which of them.
    """

    single = True

    def __init__(self, source: Source, chosen: NDArray[np.int64]) -> None:
        self._source, self._chosen = source, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def open(self, block: int) -> Records:
        """Return one record."""
        return [self._source[int(self._chosen[block])]]


class RowGroups:
    """The row groups of a Parquet file; each process opens the file for itself.

    Args:
        open_: Opens the file.
        chosen: Which of its records; None takes all.
    """

    single = False

    def __init__(self, open_: Callable[[], ParquetFile], chosen: NDArray[np.int64] | None = None) -> None:
        self._open, self._chosen = open_, chosen
        self._file, self._process = open_(), os.getpid()
        self._groups = len(self._file.offsets) - 1

    def __len__(self) -> int:
        return self._groups

    def open(self, block: int) -> Records:
        """Read a row group; its rows become records when asked for."""
        if self._process != os.getpid():
            self._file, self._process = self._open(), os.getpid()
        file, first, last = self._file, int(self._file.offsets[block]), int(self._file.offsets[block + 1])
        rows = np.arange(last - first)
        if self._chosen is not None:
            rows = self._chosen[slice(*np.searchsorted(self._chosen, [first, last]))] - first
        table = file.table(block)
        return LazyRecords(len(rows), lambda index: file.document(table, int(rows[index]), block))


class JsonRanges:
    """JSONL in ranges of bytes: a block holds the lines that begin in it. Nothing is read before it is needed."""

    single = False

    def __init__(self, file: DataFile) -> None:
        self._file = file

    def __len__(self) -> int:
        return -(-self._file.size // RANGE_BYTES)

    def open(self, block: int) -> Records:
        """Read a range; its lines are parsed when asked for."""
        start = block * RANGE_BYTES
        found: list[tuple[int, bytes]] = []
        with self._file.open() as file:
            file.seek(max(0, start - 1))
            if start:
                file.readline()  # the end of a line that began before
            at = file.tell()
            while at < start + RANGE_BYTES and (line := file.readline()):
                if line.strip():
                    found.append((at, line))
                at += len(line)
        return LazyRecords(
            len(found), lambda index: parse_line(found[index][1], f"{self._file}, byte {found[index][0]}")
        )


class WholeFiles:
    """Files that can only be opened whole: archives, compressed and remote files. A copy stays while it is read."""

    single = False

    def __init__(self, files: Sequence[DataFile], text_key: str, keys: Sequence[str], tables: bool) -> None:
        self._files, self._text_key, self._keys, self._tables = files, text_key, keys, tables
        self._opened: WeakValueDictionary[tuple[int, int], Source] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._files)

    def open(self, block: int) -> Records:
        """Open a file, or share the one that is open in this process."""
        file, key = self._files[block], (os.getpid(), block)
        if not self._tables:
            with file.open_whole() as content:
                return [Document({self._text_key: decode(content.read(), str(file))}, str(file))]
        source = self._opened.get(key)
        if source is None:
            source = file.passing_copy(lambda copy: open_file(copy, self._text_key, self._keys, str(file)))
            self._opened[key] = source
        return source


def stream_blocks(found: FoundData, text_key: str, keys: Sequence[str]) -> list[Blocks]:
    """Return the blocks of files, none of which is read whole before it is needed."""
    if found.saved is not None:
        saved = SavedDataset(found.saved, keys)
        return [SingleRecords(saved, np.arange(len(saved)))]
    if not found.tables:
        return [WholeFiles(found.files, text_key, keys, tables=False)]
    with ThreadPoolExecutor(_OPENED_TOGETHER) as threads:
        return list(threads.map(lambda file: _file_blocks(file, text_key, keys), found.files))


def _file_blocks(file: DataFile, text_key: str, keys: Sequence[str]) -> Blocks:
    if file.compression is None and file.suffix in (".jsonl", ".ndjson"):
        return JsonRanges(file)
    if file.compression is None and file.suffix == ".parquet":
        return RowGroups(partial(ParquetFile, file.path, keys, str(file), None if file.path else file.open))
    if file.path is not None and file.compression is None and file.suffix in (".arrow", ".feather"):
        source = open_file(file.path, text_key, keys)
        return SingleRecords(source, np.arange(len(source)))
    return WholeFiles([file], text_key, keys, tables=True)


def all_records(blocks: Sequence[Blocks]) -> Iterator[Document]:
    """Yield every record, in order."""
    for part in blocks:
        for block in range(len(part)):
            records = part.open(block)
            yield from (records[index] for index in range(len(records)))
