"""Build a directory once, however many processes that share a file system ask for it at the same time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from veomni.logging import create_logger

logger = create_logger(__name__)

_SILENT_SECONDS = 30.0


def build_once(directory: Path, build: Callable[[Path], None], problem: Callable[[Path], str | None]) -> None:
    """Make sure ``directory`` holds a good copy; the first process to get the lock builds it, the others find it.

    Nothing half-written is ever seen under the name ``directory``: it is built beside it, flushed and renamed. No
    process group is needed.

    Args:
        directory: Where the result belongs.
        build: Fills an empty directory.
        problem: Says what is wrong with a directory, or None.
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
        found = problem(directory) if directory.exists() else "absent"
        if found is None:
            return
        if directory.exists():
            logger.warning("%s is damaged (%s) and is built again", directory, found)
            shutil.rmtree(directory)
        _build_beside(directory, build)
    finally:
        lock.release()


def _build_beside(directory: Path, build: Callable[[Path], None]) -> None:
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
