"""Documents by index, over one or many files, with a held-out part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from veomni.data.corpus import PYTHON_STDLIB, python_stdlib_files
from veomni.data.media_records import texts_of
from veomni.data.order import hashed_uniform
from veomni.data.records import MEDIA_KEYS, TOOLS_KEY, Document, messages_of, text_of
from veomni.data.sources import ArrowFile, JsonArray, JsonLines, ParquetFile, SavedDataset, Source, TextFiles
from veomni.data.transforms import TRANSFORMS
from veomni.errors import DataError
from veomni.logging import create_logger

logger = create_logger(__name__)

_TABLES = {".jsonl", ".ndjson", ".parquet", ".arrow", ".feather"}


class TextDataset:
    """A map-style dataset: ``dataset[i]`` is a :class:`Document`, read when asked for.

    Args:
        sources: What it is made of, in order.
        indices: Which documents of ``sources`` belong to it, ascending.
        data_type: Name of the transform that tokenises it.
        text_key: Field that holds the text (plaintext).
        messages_key: Field that holds the messages (conversation).
    """

    def __init__(
        self, sources: Sequence[Source], indices: NDArray[np.int64], data_type: str, text_key: str, messages_key: str
    ) -> None:
        self.sources, self.indices = sources, indices
        self.data_type, self.text_key, self.messages_key = data_type, text_key, messages_key
        self._offsets = np.array([0, *accumulate(len(source) for source in sources)])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Document:
        position = int(self.indices[index])
        source = int(np.searchsorted(self._offsets, position, side="right")) - 1
        return self.sources[source][position - int(self._offsets[source])]

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    @property
    def files(self) -> list[Path]:
        """All files the dataset is made of, in order."""
        return [path for source in self.sources for path in source.files]

    def texts(self) -> Iterator[str]:
        """Yield what a tokenizer is trained on: the text of every document, or of every message.

        Raises:
            DataError: a record lacks its field, or holds the wrong kind of thing.
        """
        for document in self:
            if self.data_type == "conversation":
                messages = messages_of(document, self.messages_key)
                yield from (message["content"] for message in messages if "content" in message)  # calls have none
            elif self.data_type == "multimodal":
                yield from texts_of(document, self.messages_key)
            else:
                yield text_of(document, self.text_key)


def build_dataset(
    train_path: str | Sequence[str],
    *,
    data_type: str = "plaintext",
    text_key: str = "text",
    messages_key: str = "messages",
    max_documents: int | None = None,
    eval_fraction: float = 0.0,
    seed: int = 0,
) -> tuple[TextDataset, TextDataset | None]:
    """Open text data and split off a held-out part.

    Whether a document is held out depends on its index and ``seed`` alone, so appending data moves no document across.

    Args:
        train_path: Files, directories, saved Hugging Face datasets, or ``"python-stdlib"``.
        data_type: A registered transform, ``plaintext`` or ``conversation``; or ``multimodal``.
        text_key: Field of a record that holds the text.
        messages_key: Field of a record that holds the messages.
        max_documents: Use the first so many documents only.
        eval_fraction: Expected share of the documents that is held out; 0 holds nothing out.
        seed: Seed of the held-out choice.

    Returns:
        The training dataset, and the held-out one or None.

    Raises:
        DataError: a path is missing, empty or unreadable, the first record lacks its field, or a part is empty.
        ConfigError: no transform is called ``data_type``.
    """
    if data_type != "multimodal":
        TRANSFORMS.get(data_type)
    paths = [train_path] if isinstance(train_path, str) else list(train_path)
    keys = (text_key, messages_key, TOOLS_KEY, *MEDIA_KEYS.values())
    sources = [source for path in paths for source in _open(path, text_key, keys)]
    total = sum(len(source) for source in sources)
    if not total:
        raise DataError(f"{', '.join(paths) or 'data.train_path'}: no document in it", "point data.train_path at data")
    indices = np.arange(total if max_documents is None else min(total, max_documents), dtype=np.int64)
    held_out = hashed_uniform(indices, "held-out", seed) < eval_fraction

    def part(chosen: NDArray[np.int64]) -> TextDataset:
        return TextDataset(sources, chosen, data_type, text_key, messages_key)

    train, held = part(indices[~held_out]), part(indices[held_out])
    if eval_fraction and not (len(train) and len(held)):
        parts = f"{len(held)} held out, {len(train)} to train on"
        problem = f"data.eval_fraction {eval_fraction} of {len(indices)} documents leaves {parts}"
        raise DataError(problem, "change data.eval_fraction, or give data.eval_path")
    next(train.texts())  # a wrong field name is found now, not after the model is built
    logger.info_rank0("%s: %s documents to train on, %s held out", ", ".join(paths), len(train), len(held))
    return train, held if eval_fraction else None


def _open(path: str, text_key: str, keys: Sequence[str]) -> list[Source]:
    if path == PYTHON_STDLIB:
        return [TextFiles(python_stdlib_files(), text_key)]
    location = Path(path).expanduser()
    if not location.exists():
        raise DataError(f"{path} does not exist", f"give an existing file or directory, or {PYTHON_STDLIB}")
    if location.is_file():
        return [_open_file(location, text_key, keys)]
    if (location / "state.json").is_file() or (location / "dataset_dict.json").is_file():
        return [SavedDataset(location, keys)]
    files = _data_files(location)
    if files and all(file.suffix.lower() in _TABLES | {".json"} for file in files):
        return [_open_file(file, text_key, keys) for file in files]
    return [TextFiles(files, text_key)]


def _open_file(path: Path, text_key: str, keys: Sequence[str]) -> Source:
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return JsonLines(path)
        case ".json":
            return JsonArray(path)
        case ".parquet":
            return ParquetFile(path, keys)
        case ".arrow" | ".feather":
            return ArrowFile(path, keys)
        case _:
            return TextFiles([path], text_key)


def _data_files(directory: Path) -> list[Path]:
    """Return a directory's files, sorted: only the tables if there are any, else all but the hidden ones."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(directory).parts)]
    chosen = [path for path in visible if path.suffix.lower() in _TABLES] or visible
    if len(chosen) < len(found):
        example = next(path for path in found if path not in set(chosen))
        logger.info_rank0("%s: %s files are not data and ignored (%s)", directory, len(found) - len(chosen), example)
    return chosen
