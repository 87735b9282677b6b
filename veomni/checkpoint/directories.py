"""Names on disk: one directory per step, temporary until it is sealed."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

_PUBLISHED = re.compile(r"global_step_(\d+)")
_TEMPORARY = re.compile(r"global_step_\d+\.(tmp|old)-[0-9a-f]+")


def step_directory(root: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` is published."""
    return root / f"global_step_{step}"


def published_steps(root: Path) -> list[int]:
    """Return the steps that have a published directory, newest first; foreign names are ignored."""
    if not root.is_dir():
        return []
    found = (_PUBLISHED.fullmatch(entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def remove_leftovers(root: Path) -> list[str]:
    """Delete what a killed save or deletion left behind, and return the names."""
    left = [entry for entry in root.iterdir() if _TEMPORARY.fullmatch(entry.name)]
    for entry in left:
        shutil.rmtree(entry, ignore_errors=True)
    return [entry.name for entry in left]


def retire(directory: Path, token: str) -> None:
    """Delete a published directory; it loses its name first, so that no half-deleted one is ever read."""
    doomed = directory.with_name(f"{directory.name}.old-{token}")
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def set_aside(directory: Path, token: str) -> Path:
    """Take its name from a damaged checkpoint, for people to look at, and return the new one; nothing deletes it."""
    return directory.rename(directory.with_name(f"{directory.name}.damaged-{token}"))


def sync_directory(directory: Path) -> None:
    """Make renames and new names in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
