"""Strategies and accelerators by name, from entry points: the built-in ones and third parties' alike."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from veomni.errors import ConfigError
from veomni.registry import did_you_mean


def load_plugin(group: str, name: str, built_in: Mapping[str, Any]) -> Any:
    """Return what the entry point ``name`` of ``group`` refers to.

    Args:
        group: ``veomni.strategies`` or ``veomni.accelerators``.
        name: What a configuration says.
        built_in: This package's own, for a source tree that was never installed and so has no entry points.

    Raises:
        ConfigError: no installed package provides that name.
    """
    if name in built_in:
        return built_in[name]
    found = {point.name: point for point in entry_points(group=group)}
    if name not in found:
        known = sorted({*found, *built_in})
        raise ConfigError(f"no entry point of group {group} is called {name!r}", did_you_mean(name, known))
    return found[name].load()
