"""A named table that things register themselves in, with a did-you-mean for names that are not there."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from veomni.errors import ConfigError

T = TypeVar("T")


def did_you_mean(name: str, known: list[str]) -> str:
    """Return the fix for an unknown ``name``: the nearest known one, or all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"use one of: {', '.join(sorted(known)) or 'none registered'}"


class Registry(Generic[T]):
    """Map names to objects.

    Args:
        kind: What the entries are, for messages ("model config", "transform").

    Example::

        TRANSFORMS = Registry("transform")

        @TRANSFORMS.register("plaintext")
        def plaintext(...): ...
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
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
            ConfigError: nothing has that name.
        """
        if name not in self._entries:
            raise ConfigError(f"no {self.kind} is called {name!r}", did_you_mean(name, list(self._entries)))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
