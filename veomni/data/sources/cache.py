"""Work that depends only on the data, kept between runs: built once, under a digest of all it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from veomni.logging import create_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = create_logger(__name__)

_SILENT_SECONDS = 30.0
_CACHED_FROM = 1 << 26  # bytes; less is hashed as fast as a cached digest is read


def cache_directory(chosen: str | Path | None) -> Path:
    """Return ``chosen``, or ``$XDG_CACHE_HOME/veomni`` (``~/.cache/veomni``) for None."""
    if chosen is not None:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veomni"


def build_once(directory: Path, build: Callable[[Path], object], problem: Callable[[Path], str | None]) -> None:
    """Make sure ``directory`` holds a good copy; of many processes the first to get the lock builds it.

    ``build`` fills an empty directory beside its place, which is then flushed and renamed: nothing half-written has the
    name ``directory``. ``problem`` returns what is wrong with one, or None. No process group is needed.
    """
    from filelock import FileLock, Timeout

    directory.parent.mkdir(parents=True, exist_ok=True)
    if directory.exists() and problem(directory) is None:
        return
    lock = FileLock(directory.with_suffix(".lock"))
    try:
        lock.acquire(timeout=_SILENT_SECONDS)
    except Timeout:
        logger.info("waiting for another process to build %s", directory)
        lock.acquire()
    try:
        if directory.exists():
            found = problem(directory)
            if found is None:
                return
            logger.warning("%s is damaged (%s) and is built again", directory, found)
            shutil.rmtree(directory)
        _build_beside(directory, build)
    finally:
        lock.release()


def _build_beside(directory: Path, build: Callable[[Path], object]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        build(temporary)
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)  # mkdtemp's 0700 would shut out other users of a shared cache
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def lacks(name: str) -> Callable[[Path], str | None]:
    """Return the ``problem`` of :func:`build_once` for a directory that is good if it holds the file ``name``."""
    return lambda directory: None if (directory / name).is_file() else f"no {name}"


def digest(value: Any) -> str:
    """Return a digest of something JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of everything that decides which ids a text gets, padding and truncation aside."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest([type(tokenizer).__name__, tokenizer.get_vocab(), special])
    return digest([{**json.loads(backend.to_str()), "padding": None, "truncation": None}, special])


def file_digest(path: Path, cache_dir: Path) -> str:
    """Return a digest of a file's content; of a large file it is kept in ``cache_dir`` by path, size and time."""
    stat = path.stat()
    if stat.st_size < _CACHED_FROM:
        return _hash(path)
    kept = cache_dir / "digests" / digest([str(path.resolve()), stat.st_size, stat.st_mtime_ns])

    build_once(kept, lambda empty: (empty / "digest").write_text(_hash(path)), lacks("digest"))
    return (kept / "digest").read_text()


def sampled_digest(path: Path, count: int, size: int) -> str:
    """Return a digest of a file's size and of up to ``count`` blocks of ``size`` bytes, spread over it."""
    total = path.stat().st_size
    hashed = hashlib.blake2b(str(total).encode(), digest_size=16)
    with path.open("rb") as file:
        for start in np.linspace(0, max(0, total - size), min(count, -(-total // size))).astype(np.int64).tolist():
            file.seek(start)
            hashed.update(file.read(size))
    return hashed.hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
