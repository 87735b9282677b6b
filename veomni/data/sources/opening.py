"""From a path or URL to the files it stands for, and how each is read: one table of file formats."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from weakref import WeakValueDictionary

from veomni.data.sources.archives import tar_archive
from veomni.data.sources.blocks import Blocks, Records
from veomni.data.sources.corpora import CORPORA, PYTHON_STDLIB, corpus_files
from veomni.data.sources.files import json_array, json_lines, json_ranges, text_file
from veomni.data.sources.locations import DataFile, is_url, local_file, remote_files, shown
from veomni.data.sources.schema import RecordSchema
from veomni.data.sources.tables import ParquetFile, arrow_table
from veomni.errors import DataError
from veomni.logging import create_logger

logger = create_logger(__name__)


@dataclass(frozen=True)
class FileFormat:
    """How uncompressed files are read: ``read`` returns the records of one on this machine.

    ``split`` returns the blocks of one that is not copied, behind a URL only where ``splits_remote``.
    """

    read: Callable[[DataFile, RecordSchema], Records]
    split: Callable[[DataFile, RecordSchema], Blocks] | None = None
    splits_remote: bool = True

    def blocks(self, file: DataFile, schema: RecordSchema) -> Blocks:
        """Return what a stream reads of a file: its blocks, or all of it when it is needed."""
        if self is TEXT:
            return Blocks(1, lambda _: self.read(file, schema))
        if self.split and not file.compression and (self.splits_remote or file.path):
            return self.split(file, schema)
        shared: WeakValueDictionary[int, Records] = WeakValueDictionary()  # by process; a copy stays while it is read

        def open_(_: int) -> Records:
            records = shared.get(os.getpid())
            if records is None:
                records = shared[os.getpid()] = file.passing_copy(lambda copy: self.read(copy, schema))
            return records

        return Blocks(1, open_)


TEXT = FileFormat(text_file)
_LINES = FileFormat(json_lines, json_ranges)
_ARROW = FileFormat(arrow_table, lambda file, schema: arrow_table(file, schema).blocks(), splits_remote=False)
_PARQUET = FileFormat(ParquetFile, lambda file, schema: ParquetFile(file, schema).blocks())
TABLES = {
    ".jsonl": _LINES, ".ndjson": _LINES, ".parquet": _PARQUET, ".arrow": _ARROW, ".feather": _ARROW,
    ".tar": FileFormat(tar_archive),
}  # fmt: skip
"""Suffixes of files that hold many records."""

_TABLES_ALONE = {**TABLES, ".json": FileFormat(json_array)}  # JSON is a table where nothing else is there

_UNSUPPORTED = frozenset({".csv", ".tsv", ".xlsx", ".xls"})  # tables that would be read as one plain text each


def find_data(path: str, cache_dir: Path) -> list[tuple[DataFile, FileFormat]]:
    """Return the files that a path stands for (DataError: none) and their formats; corpora are in ``cache_dir``."""
    if path in CORPORA:
        files = [local_file(file) for file in corpus_files(path, cache_dir)]
        return [(file, TEXT if path == PYTHON_STDLIB else _LINES) for file in files]
    if is_url(path):
        return _chosen(remote_files(path), path)
    location = Path(path.removeprefix("file://")).expanduser()
    if not location.exists():
        raise DataError(f"{path} does not exist", f"give an existing file or directory, or one of {', '.join(CORPORA)}")
    if location.is_file():
        return _chosen([local_file(location)], path)
    return _chosen([local_file(file, location) for file in sorted(location.rglob("*")) if file.is_file()], path)


def _chosen(found: list[DataFile], path: str) -> list[tuple[DataFile, FileFormat]]:
    """Keep only the tables if there are any, else all but the hidden files."""
    by_name = {file.relative: file for file in found}
    if "state.json" in by_name or "dataset_dict.json" in by_name:
        return [(file, _ARROW) for file in _saved(by_name, path)]
    visible = [file for file in found if not any(part.startswith(".") for part in PurePosixPath(file.relative).parts)]
    visible = visible if len(found) > 1 else found
    chosen = [file for file in visible if file.suffix in TABLES] or visible
    unsupported = next((file for file in chosen if file.suffix in _UNSUPPORTED), None)
    if unsupported is not None:
        fix = "convert it, for example pandas.read_csv(path).to_parquet(...), to Parquet or JSONL"
        raise DataError(f"{unsupported}: {unsupported.suffix} tables are not supported", fix)
    if len(chosen) < len(found):
        example = next(file for file in found if file not in set(chosen))
        logger.info_rank0("%s: %s files are not data and ignored (%s)", shown(path), len(found) - len(chosen), example)
    tables = all(file.suffix in _TABLES_ALONE for file in chosen)
    return [(file, _TABLES_ALONE[file.suffix] if tables else TEXT) for file in chosen]


def _saved(by_name: Mapping[str, DataFile], path: str) -> list[DataFile]:
    """Return the files of a dataset that the library `datasets` has saved, in the order of its state."""
    splits = by_name.get("dataset_dict.json")
    state = splits or by_name["state.json"]
    try:
        read = json.loads(state.content())
        if splits is None:
            return [by_name[entry["filename"]] for entry in read["_data_files"]]
        named = ", ".join(f"{shown(path)}/{split}" for split in read["splits"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state}: not the state of a saved dataset: {error!r}", "save the dataset again") from error
    raise DataError(f"{shown(path)} holds several splits", f"name one of: {named}")
