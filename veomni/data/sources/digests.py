"""What tokenized data depends on, as digests: the bytes of the files, the choice of documents, the tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CACHED_FROM = 1 << 26  # bytes; less is hashed as fast as a cached digest is read


def digest(value: Any) -> str:
    """Return a digest of something JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of everything that decides which ids a text gets, padding and truncation aside."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest([type(tokenizer).__name__, tokenizer.get_vocab(), special])
    state = json.loads(backend.to_str())
    return digest([{**state, "padding": None, "truncation": None}, special])


def file_digest(path: Path, cache_dir: Path) -> str:
    """Return a digest of a file's content; of a large file it is kept in ``cache_dir`` by path, size and time."""
    stat = path.stat()
    if stat.st_size < _CACHED_FROM:
        return _hash(path)
    seen = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    cached = cache_dir / "digests" / f"{digest(seen)}.txt"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Written whole and renamed: another process may be reading or writing the same one.
        temporary = cached.with_suffix(f".{os.getpid()}")
        temporary.write_text(_hash(path))
        temporary.replace(cached)
    return cached.read_text()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
