"""The manifest: what files a checkpoint has and what is in them. A directory without a valid one is no checkpoint."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veomni.checkpoint.directories import write_durably

_NAME = "manifest.json"
_VERSION = 1


def describe_file(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(directory: Path, files: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Seal ``directory``: write the manifest durably."""
    content = {"version": _VERSION, **facts, "files": dict(sorted(files.items()))}
    write_durably(directory / _NAME, json.dumps(content, indent=1).encode())


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest, or None when there is none that can be read."""
    try:
        content = json.loads((directory / _NAME).read_text(encoding="utf-8"))
        known = content["version"] == _VERSION
        valid = known and isinstance(content["files"], dict) and isinstance(content["step"], int)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if valid else None


def structure_problem(directory: Path) -> str | None:
    """Return what is wrong with the manifest, or with the names and sizes of the files, or None."""
    manifest = read_manifest(directory)
    if manifest is None:
        return "it has no valid manifest" if directory.is_dir() else "there is no such directory"
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in directory.rglob("*") if path.is_file()}
    del sizes[_NAME]
    for name, facts in manifest["files"].items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != facts["size"]:
            return f"{name} has {sizes[name]} bytes instead of {facts['size']}"
    extra = sorted(sizes.keys() - manifest["files"].keys())
    return f"{extra[0]} does not belong to it" if extra else None


def content_problem(directory: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return what is wrong with the structure, or the contents of every ``parts``-th file from ``part``, or None."""
    problem, manifest = structure_problem(directory), read_manifest(directory)
    if problem is not None or manifest is None:
        return problem
    for name, facts in sorted(manifest["files"].items())[part::parts]:
        try:
            found = describe_file(directory / name)
        except OSError as error:
            return f"{name} cannot be read: {error}"
        if found["sha256"] != facts["sha256"]:
            return f"the contents of {name} have changed"
    return None
