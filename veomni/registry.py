"""Named tables of components: this package's own, and those that installed packages bring as entry points."""

import difflib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from veomni.errors import ConfigError

T = TypeVar("T")


def did_you_mean(name: str, known: list[str], otherwise: str = "") -> str:
    """Return the fix for an unknown ``name``: the nearest known one, else ``otherwise``, or all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return otherwise or f"use one of: {', '.join(sorted(known)) or 'none registered'}"


@functools.cache
def _entry_points(group: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Read once per path: every look-up would read the metadata of all installed packages."""
    return {point.name: point for point in entry_points(group=group)}


class Registry(Generic[T]):
    """Map names to components: ``@OPTIMIZERS.register("adamw")`` above a class or function.

    Args:
        kind: What the entries are, for messages ("model config", "optimizer").
        group: Entry-point group in which other packages name theirs; None takes registered ones only.
        home: Module that registers the built-in entries when it is imported; imported at the first look-up.
    """

    def __init__(self, kind: str, *, group: str | None = None, home: str | None = None) -> None:
        self.kind, self.group, self._home = kind, group, home
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters its target under ``name``, which nothing else may have."""

        def decorate(entry: T) -> T:
            if self._entries.get(name, entry) is not entry:
                raise ConfigError(f"{self.kind} {name!r} is registered twice", "choose another name")
            self._entries[name] = entry
            return entry

        return decorate

    def get(self, name: str) -> T:
        """Return the entry called ``name``; ConfigError for none, or where the package of it cannot be imported."""
        known = self._known()
        if not isinstance(name, str) or name not in known:
            raise ConfigError(f"no {self.kind} is called {name!r}", did_you_mean(str(name), list(known)))
        found = known[name]
        if not isinstance(found, EntryPoint):
            return found
        try:
            loaded: T = found.load()
        except (ImportError, AttributeError) as error:
            problem = f"{self.kind} {name!r} cannot be loaded from {found.value}: {error}"
            raise ConfigError(problem, "fix or uninstall the package that provides it") from error
        return loaded

    def _known(self) -> dict[str, T | EntryPoint]:
        if self._home is not None:
            importlib.import_module(self._home)
        points = {} if self.group is None else _entry_points(self.group, tuple(sys.path))
        own: dict[str, T | EntryPoint] = dict(self._entries)
        return own | {name: point for name, point in points.items() if name not in own}

    def __contains__(self, name: object) -> bool:
        return name in self._known()

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())
