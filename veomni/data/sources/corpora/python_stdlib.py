"""The sources of the running interpreter's standard library, as plain text."""

import sysconfig
from pathlib import Path

# Packages of others, and files that are tests: some of those are not UTF-8 or not Python on purpose.
_OTHERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
# Tables in Python's syntax: a fifth of all bytes, far easier to predict than code, and clustered in few directories.
_TABLES = {"encodings", "pydoc_data", "_compat_pickle.py", "entities.py", "locale.py", "stringprep.py"}
_GENERATED = "_sysconfigdata"


def python_stdlib_files() -> list[Path]:
    """Return the ``.py`` files of the standard library that are code, sorted by their path inside it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root): path for path in root.rglob("*.py") if not path.name.startswith(_GENERATED)}
    code = (name for name in files if not (_OTHERS | _TABLES).intersection(name.parts))
    return [files[name] for name in sorted(code, key=Path.as_posix)]
