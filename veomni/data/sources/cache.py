"""Where work that depends only on the data is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(chosen: str | Path | None) -> Path:
    """Return ``chosen``, or ``$XDG_CACHE_HOME/veomni`` (``~/.cache/veomni``) for None."""
    if chosen is not None:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veomni"
