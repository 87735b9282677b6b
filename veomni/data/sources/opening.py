"""From a path or URL to the files and sources it stands for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from veomni.data.sources.archives import TarFile
from veomni.data.sources.corpora import CORPORA, PYTHON_STDLIB, corpus_files
from veomni.data.sources.files import ArrowFile, JsonArray, JsonLines, ParquetFile, SavedDataset, Source, TextFiles
from veomni.data.sources.locations import DataFile, is_url, local_file, local_path, remote_files, shown
from veomni.errors import DataError
from veomni.logging import create_logger

logger = create_logger(__name__)

TABLES = frozenset({".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".tar"})
"""Suffixes of files that hold many records; a ``.json`` file does where nothing else is there."""

_UNSUPPORTED = frozenset({".csv", ".tsv", ".xlsx", ".xls"})
"""Suffixes of tables that would be read as one plain text each."""


@dataclass(frozen=True)
class FoundData:
    """What a path stands for.

    Attributes:
        files: Its files, in order.
        tables: Whether they hold records; otherwise each is one text.
        saved: The directory, if it is a Hugging Face dataset on this machine.
    """

    files: list[DataFile]
    tables: bool
    saved: Path | None = None


def find_data(path: str, cache_dir: Path) -> FoundData:
    """Return the files that a path, a directory, a URL or the name of a built-in corpus stands for.

    Args:
        path: One of these.
        cache_dir: Where built-in corpora are kept.

    Raises:
        DataError: nothing is there.
    """
    if path in CORPORA:
        files = [local_file(file) for file in corpus_files(path, cache_dir)]
        return FoundData(files, tables=path != PYTHON_STDLIB)
    if is_url(path):
        return _chosen(remote_files(path), path)
    location = local_path(path)
    if not location.exists():
        raise DataError(f"{path} does not exist", f"give an existing file or directory, or one of {', '.join(CORPORA)}")
    if location.is_file():
        return _chosen([local_file(location)], path)
    found = sorted(file for file in location.rglob("*") if file.is_file())
    if (location / "state.json").is_file() or (location / "dataset_dict.json").is_file():
        arrow = [local_file(file, location) for file in found if file.suffix == ".arrow"]
        return FoundData(arrow, tables=True, saved=location)
    return _chosen([local_file(file, location) for file in found], path)


def open_sources(path: str, text_key: str, keys: Sequence[str], cache_dir: Path) -> list[Source]:
    """Return a path's files as sequences of records.

    Args:
        path: A file, a directory, a URL, or the name of a built-in corpus.
        text_key: The field that the text of plain text files is put in.
        keys: The columns that are read from tables.
        cache_dir: Where copies of remote and compressed files are kept, and built-in corpora.

    Raises:
        DataError: it is not there, or cannot be read.
    """
    found = find_data(path, cache_dir)
    if found.saved is not None:
        return [SavedDataset(found.saved, keys)]
    copies = [file.kept_copy(cache_dir) for file in found.files]
    if not found.tables:
        return [TextFiles(copies, text_key)]
    return [
        open_file(copy, text_key, keys, None if copy == file.path else str(file))
        for copy, file in zip(copies, found.files, strict=True)
    ]


def open_file(path: Path, text_key: str, keys: Sequence[str], name: str | None = None) -> Source:
    """Return a file of records as a sequence; ``name`` is what messages call it, None for its path."""
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return JsonLines(path, name)
        case ".json":
            return JsonArray(path, name)
        case ".parquet":
            return ParquetFile(path, keys, name)
        case ".arrow" | ".feather":
            return ArrowFile(path, keys, name)
        case ".tar":
            return TarFile(path, text_key, name)
        case _:
            return TextFiles([path], text_key)


def _chosen(found: list[DataFile], path: str) -> FoundData:
    """Keep only the tables if there are any, else all but the hidden files."""
    saved = next((file for file in found if file.relative == "state.json"), None)
    if saved is not None:
        return FoundData(_listed(saved, found), tables=True)
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
    tables = bool(chosen) and all(file.suffix in TABLES | {".json"} for file in chosen)
    return FoundData(chosen, tables)


def _listed(state: DataFile, found: Sequence[DataFile]) -> list[DataFile]:
    """Return the files of a remote Hugging Face dataset in the order it says."""
    by_name = {file.relative: file for file in found}
    try:
        with state.open() as file:
            names = [str(entry["filename"]) for entry in json.load(file)["_data_files"]]
        return [by_name[name] for name in names]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state}: not the state of a saved dataset: {error!r}", "save the dataset again") from error
