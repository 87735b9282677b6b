"""The sources of the running interpreter's standard library, as plain text."""

from __future__ import annotations

import sysconfig
from pathlib import Path

# Packages of others, and files that are tests: some of those are not UTF-8 or not Python on purpose.
_EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"})


def python_stdlib_files() -> list[Path]:
    """Return the ``.py`` files of the standard library, sorted by their path inside it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    return [files[name] for name in sorted(files) if not _EXCLUDED.intersection(name.split("/")[:-1])]
