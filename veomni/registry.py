"""Named tables of components: this package's own, and those that installed packages bring as entry points."""

from __future__ import annotations

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
    return (
        f"did you mean {near[0]!r}?"
        if near
        else otherwise or f"use one of: {', '.join(sorted(known)) or 'none registered'}"
    )


@functools.cache
def _entry_points(group: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Read once per path: every look-up would read the metadata of all installed packages."""
    return {point.name: point for point in entry_points(group=group)}


class Registry(Generic[T]):
    """Map names to components.

    Args:
        kind: What the entries are, for messages ("model config", "optimizer").
        group: Entry-point group in which other packages name theirs; None takes registered ones only.
        home: Module that registers the built-in entries when it is imported; imported at the first look-up.

    Example::

        OPTIMIZERS = Registry("optimizer", group="veomni.optimizers", home="veomni.optim")

        @OPTIMIZERS.register("adamw")
        def adamw(...): ...
    """

    def __init__(self, kind: str, *, group: str | None = None, home: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._home = home
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters its target under ``name``.

        Raises:
            ConfigError: ``name`` is taken by something else.
        """

        def decorate(entry: T) -> T:
            if self._entries.get(name, entry) is not entry:
                raise ConfigError(f"{self.kind} {name!r} is registered twice", "choose another name")
            self._entries[name] = entry
            return entry

        return decorate

    def get(self, name: str) -> T:
        """Return the entry called ``name``.

        Raises:
            ConfigError: nothing has that name, or the package that provides it cannot be imported.
        """
        self._import_home()
        if name in self._entries:
            return self._entries[name]
        points = self._points()
        if name not in points:
            raise ConfigError(f"no {self.kind} is called {name!r}", did_you_mean(name, list(self)))
        try:
            return points[name].load()
        except (ImportError, AttributeError) as error:
            problem = f"{self.kind} {name!r} cannot be loaded from {points[name].value}: {error}"
            raise ConfigError(problem, "fix or uninstall the package that provides it") from error

    def _import_home(self) -> None:
        if self._home is not None:
            importlib.import_module(self._home)

    def _points(self) -> dict[str, EntryPoint]:
        return {} if self.group is None else _entry_points(self.group, tuple(sys.path))

    def __contains__(self, name: object) -> bool:
        self._import_home()
        return name in self._entries or name in self._points()

    def __iter__(self) -> Iterator[str]:
        self._import_home()
        return iter({**self._entries, **self._points()})

    def __len__(self) -> int:
        return sum(1 for _ in self)
