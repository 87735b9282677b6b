"""Files and directories that a configuration names: there, readable, writable."""

import os
from collections.abc import Iterator
from pathlib import Path

from veomni.config.problems import Problem


def is_cached(name: str) -> bool:
    """Whether ``name`` is that of a hub model in the local Hugging Face cache."""
    if os.path.exists(name) or name.count("/") != 1 or name.startswith((".", "/")) or name.endswith("/"):
        return False
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def exists(key: str, path: str) -> Iterator[Problem]:
    """Yield why the file or directory that ``key`` names cannot be read."""
    if not os.path.exists(path):
        yield Problem(f"{key}: {path} does not exist", _fix(key, path))
    elif not os.access(path, os.R_OK):
        yield Problem(f"{key}: {path} cannot be read by this user", f"change its permissions, or --{key}")


def is_directory(key: str, path: str, hint: str) -> Iterator[Problem]:
    """Yield why what ``key`` names is no directory; ``hint`` is what belongs there."""
    if os.path.isfile(path):
        yield Problem(f"{key}: {path} is a file", f"give the directory ({hint})")
    elif not os.path.isdir(path):
        yield Problem(f"{key}: {path} does not exist", f"{_fix(key, path)}; {hint}")


def _fix(key: str, path: str) -> str:
    where = "" if os.path.isabs(path) else f" (relative to {os.getcwd()})"
    return f"give --{key} a path that does{where}"


def is_writable(key: str, path: str) -> Iterator[Problem]:
    """Yield why the directory that ``key`` names cannot be made or written to; nothing is made."""
    if "://" in path:
        yield Problem(f"{key}: {path} is not a local path", "give a directory of a mounted file system")
        return
    present = Path(path).absolute()
    while not os.path.lexists(present):
        present = present.parent
    if not present.is_dir():
        yield Problem(f"{key}: {present} is not a directory", f"give --{key} another path")
    elif not os.access(present, os.W_OK | os.X_OK):
        yield Problem(f"{key}: {present} cannot be written to by this user", f"give --{key} another path")
