"""Parquet and Arrow files as records, read lazily; of their columns, those that the schema needs."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from veomni.data.sources.blocks import Blocks, Records
from veomni.data.sources.locations import DataFile
from veomni.data.sources.records import Document
from veomni.data.sources.schema import RecordSchema
from veomni.errors import DataError


class ParquetFile(Records):
    """A Parquet file, one row group in memory at a time, which is also a block (DataError: it cannot be read)."""

    def __init__(self, file: DataFile, schema: RecordSchema) -> None:
        self._file, self._opened = file, (-1, None)
        opened = self._handle()
        self._columns = _present(schema, opened.schema_arrow.names)
        groups = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
        self._offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(groups, dtype=np.int64)])
        self._last = (-1, Records(0, self._record))
        super().__init__(int(self._offsets[-1]), self._record)

    @override
    def blocks(self, chosen: NDArray[np.int64] | None = None) -> Blocks:
        return Blocks(len(self._offsets) - 1, lambda group: self._group(group, chosen))

    def _group(self, group: int, chosen: NDArray[np.int64] | None = None) -> Records:
        """Read a row group; its rows become records on access."""
        first, stop = self._offsets[group : group + 2].tolist()
        rows = np.arange(first, stop) if chosen is None else chosen[slice(*np.searchsorted(chosen, [first, stop]))]
        table = _readable(self._file, lambda: self._handle().read_row_group(group, self._columns, use_threads=False))
        return Records(len(rows), lambda index: _row(table, int(rows[index]) - first, self._file, int(rows[index])))

    def _record(self, index: int) -> Document:
        group = int(np.searchsorted(self._offsets, index, side="right")) - 1
        if self._last[0] != group:
            self._last = group, self._group(group)
        return self._last[1][index - int(self._offsets[group])]

    def _handle(self) -> Any:
        """Return the opened file; each process opens it for itself, as a handle does not survive a fork."""
        import pyarrow.parquet as pq

        process, file = os.getpid(), self._file
        if self._opened[0] != process:
            opened = _readable(file, lambda: pq.ParquetFile(file.path or file.open(), memory_map=file.path is not None))
            self._opened = process, opened
        return self._opened[1]


def arrow_table(file: DataFile, schema: RecordSchema) -> Records:
    """Return an Arrow IPC file or stream on this machine, memory-mapped: only the rows that are used are read."""
    import pyarrow as pa

    def read() -> Any:
        mapped = pa.memory_map(str(file.path))
        try:
            return pa.ipc.open_file(mapped).read_all()
        except pa.ArrowInvalid:
            mapped.seek(0)
            return pa.ipc.open_stream(mapped).read_all()

    table = _readable(file, read)
    table = table.select(_present(schema, table.column_names) or table.column_names)
    return Records(table.num_rows, lambda index: _row(table, index, file, index))


def _present(schema: RecordSchema, names: Sequence[str]) -> list[str] | None:
    """Return the columns to read, None for all: where none of the schema's is there, messages name the others."""
    return [key for key in schema.columns if key in names] or None


def _row(table: Any, row: int, file: DataFile, index: int) -> Document:
    record = {name: table.column(name)[row].as_py() for name in table.column_names}
    return Document(record, f"{file}, record {index + 1}")


def _readable(file: DataFile, read: Callable[[], Any]) -> Any:
    import pyarrow as pa

    try:
        return read()
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}", "the file is damaged or of another kind") from error
