"""The keys behind Python arguments: errors name what a caller of Python gave, and a run from a file its keys too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, get_args

from veomni.errors import InputError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from veomni.config.base import Section

_keys: dict[str, str] = {}


def record_keys(schema: type[BaseModel]) -> None:
    """Let :func:`describe` name the keys of ``schema``, because the run was started from a configuration."""
    for argument, key in _arguments(schema):
        _keys.setdefault(argument, key)


def describe(error: InputError) -> str:
    """Return the message of an error, with the keys of the arguments in ``error.field`` if there are any."""
    keys = dict.fromkeys(_keys[name] for name in error.field.split() if name in _keys)
    return f"{error}\n  in the configuration: {', '.join(keys)}" if keys else str(error)


def _arguments(schema: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield arguments ("Ulysses.size") with their keys ("train.ulysses_parallel_size")."""
    from veomni.config.keys import walk  # pydantic: the supervisor of ranks starts without it

    for key, field in walk(schema):
        entries = [mark for part in get_args(field.annotation) for mark in getattr(part, "__metadata__", ())]
        for section in (field.annotation, *_sections(field.metadata)):
            yield from ((name, f"{key}.{inner}") for name, inner in getattr(section, "renames", {}).items())
            for name in getattr(section, "configures", ()):
                yield from ((f"{name}.{inner}", f"{key}.{inner}") for inner in section.model_fields)  # type: ignore[union-attr]
        for section in _sections(entries):
            for name in getattr(section, "configures", ()):
                yield from ((f"{name}.{inner}", key) for inner in section.model_fields)
        for mark in (*field.metadata, *entries):
            supplied: Mapping[str, str] = getattr(mark, "supplied", {})
            for section in _sections([mark]):
                for name in section.configures:
                    yield from ((f"{name}.{argument}", target) for argument, target in supplied.items() if target)


def _sections(marks: Iterable[object]) -> Iterator[type[Section]]:
    for mark in marks:
        if hasattr(mark, "sections"):
            yield from mark.sections().values()
