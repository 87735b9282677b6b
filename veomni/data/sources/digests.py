"""What tokenised data depends on, as digests: the bytes of the files, the choice of documents, the tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veomni.data.sources.dataset import TextDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEMBERED_FROM = 1 << 26  # bytes; hashing less takes less time than looking the digest up is worth


def digest(value: Any) -> str:
    """Return a digest of something JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def dataset_digest(dataset: TextDataset, cache_dir: Path) -> str:
    """Return a digest of the contents of a dataset's files, in order, and of which documents are taken.

    Digests of large files are remembered in ``cache_dir`` by path, size and time of change, as git's index does.
    """
    files = [_file_digest(path, cache_dir) for path in dataset.files]
    chosen = hashlib.blake2b(dataset.indices.tobytes(), digest_size=16).hexdigest()
    return digest([files, chosen, *dataset.layout.facts()])


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of everything that decides which ids a text gets, padding and truncation aside."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest([type(tokenizer).__name__, tokenizer.get_vocab(), special])
    state = json.loads(backend.to_str())
    return digest([{**state, "padding": None, "truncation": None}, special])


def _file_digest(path: Path, cache_dir: Path) -> str:
    stat = path.stat()
    if stat.st_size < _REMEMBERED_FROM:
        return _hash(path)
    seen = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    memory = cache_dir / "digests" / f"{digest(seen)}.txt"
    if not memory.exists():
        memory.parent.mkdir(parents=True, exist_ok=True)
        # Written whole and renamed: another process may be reading or writing the same one.
        temporary = memory.with_suffix(f".{os.getpid()}")
        temporary.write_text(_hash(path))
        temporary.replace(memory)
    return memory.read_text()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
