"""Names on disk: one directory per step, temporary until it is sealed, in one that a single job uses."""

import os
import re
import shutil
import socket
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

from veomni.errors import CheckpointError

_PUBLISHED = re.compile(r"global_step_(\d+)")
_TEMPORARY = re.compile(r"global_step_\d+\.(tmp|old)-[0-9a-f]+")


def lock_directory(root: Path) -> FileLock:
    """Make ``root`` and take its lock, which the kernel releases when this process dies; to be released on success."""
    holder, lock = root / ".holder", FileLock(root / ".lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        holder.write_text(f"{socket.gethostname()} pid {os.getpid()}")
    except Timeout:
        found = holder.read_text() if holder.exists() else "unknown"
        problem = f"{root} is used by another job: {found}"
    except OSError as error:
        problem = f"{root} cannot be used: {error}"
    else:
        return lock
    fix = "wait for that job, or give another directory"
    raise CheckpointError(problem, fix, "CheckpointSchedule.directory")


def published_steps(root: Path) -> list[int]:
    """Return the steps that have a published directory, newest first; foreign names are ignored."""
    found = (_PUBLISHED.fullmatch(entry.name) for entry in root.glob("global_step_*") if entry.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def remove_leftovers(root: Path) -> list[str]:
    """Delete what a killed save or deletion left behind, and return the names."""
    left = [entry for entry in root.iterdir() if _TEMPORARY.fullmatch(entry.name)]
    for entry in left:
        shutil.rmtree(entry, ignore_errors=True)
    return [entry.name for entry in left]


def retire(directory: Path) -> None:
    """Delete a published directory; it loses its name first, so that no half-deleted one is ever read."""
    doomed = directory.rename(f"{directory}.old-{uuid.uuid4().hex}")
    shutil.rmtree(doomed, ignore_errors=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that survives a crash of the machine."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make renames and new names in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
