"""The keys behind Python arguments: errors name what a caller of Python gave, and a run from a file its keys too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
            yield from ((argument, f"{key}.{inner}") for argument, inner in getattr(section, "renames", {}).items())
            yield from ((argument, f"{key}.{inner}") for argument, inner in _options(section))
        for section in _sections(entries):
            yield from ((argument, key) for argument, _ in _options(section))
        for mark in (*field.metadata, *entries):
            targets = {argument: target for argument, target in getattr(mark, "supplied", {}).items() if target}
            names = [name for section in _sections([mark]) for name in section.configures]
            yield from ((f"{name}.{argument}", target) for name in names for argument, target in targets.items())


def _sections(marks: Iterable[object]) -> Iterator[type[Section]]:
    for mark in marks:
        if hasattr(mark, "sections"):
            yield from mark.sections().values()


def _options(section: object) -> Iterator[tuple[str, str]]:
    for name in getattr(section, "configures", ()):
        yield from ((f"{name}.{inner}", inner) for inner in getattr(section, "model_fields", ()))
