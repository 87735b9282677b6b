"""The manifest: what files a checkpoint has and what is in them. A directory without a valid one is no checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "manifest.json"
_VERSION = 1


def describe_file(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(directory: Path, files: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Seal ``directory``: write the manifest durably."""
    content = {"version": _VERSION, **facts, "files": dict(sorted(files.items()))}
    path = directory / NAME
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest, or None when there is none that can be read."""
    try:
        content = json.loads((directory / NAME).read_text(encoding="utf-8"))
        valid = (
            content["version"] == _VERSION and isinstance(content["files"], dict) and isinstance(content["step"], int)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if valid else None


def structure_problem(directory: Path, manifest: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the names and sizes of the files, or None."""
    here = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
    here.pop(NAME, None)
    for name, facts in manifest["files"].items():
        if name not in here:
            return f"{name} is missing"
        if here[name].stat().st_size != facts["size"]:
            return f"{name} has {here[name].stat().st_size} bytes instead of {facts['size']}"
    extra = sorted(here.keys() - manifest["files"].keys())
    return f"{extra[0]} does not belong to it" if extra else None


def content_problem(directory: Path, manifest: Mapping[str, Any], part: int, parts: int) -> str | None:
    """Return the first file of every ``parts``-th one whose contents differ from the manifest's hash, or None."""
    for name in sorted(manifest["files"])[part::parts]:
        try:
            found = describe_file(directory / name)
        except OSError as error:
            return f"{name} cannot be read: {error}"
        if found["sha256"] != manifest["files"][name]["sha256"]:
            return f"the contents of {name} have changed"
    return None
