"""Strategies and accelerators by name, from entry points: the built-in ones and third parties' alike."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from veomni.errors import ConfigError
from veomni.registry import did_you_mean


def load_plugin(group: str, name: str) -> Any:
    """Return what the entry point ``name`` of ``group`` refers to.

    Raises:
        ConfigError: no installed package provides that name.
    """
    found = {point.name: point for point in entry_points(group=group)}
    if name not in found:
        raise ConfigError(f"no entry point of group {group} is called {name!r}", did_you_mean(name, list(found)))
    return found[name].load()
