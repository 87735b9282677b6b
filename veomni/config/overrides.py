"""Dotted overrides: ``--train.optimizer.lr 1e-4`` on a command line, ``{"train.optimizer.lr": 1e-4}`` in code."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from veomni.config.yaml_file import merged, parse_value
from veomni.errors import ConfigError

USAGE = "SCRIPT FILE.yaml [--section.key VALUE | --section.key=VALUE ...]"


def parse_argv(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the YAML file and the overrides that a command line, without the program's name, gives."""
    files: list[str] = []
    overrides: dict[str, Any] = {}
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("-"):
            files.append(argument)
            continue
        key, value = _flag(argument, arguments)
        if key in overrides and overrides[key] != value:
            raise ConfigError(f"--{key} is given twice: {overrides[key]!r} and {value!r}", "keep one of the two")
        overrides[key] = value
    if len(files) != 1:
        problem = "no configuration file is given" if not files else f"more than one file is given: {', '.join(files)}"
        raise ConfigError(problem, f"usage: {USAGE}")
    return files[0], overrides


def _flag(argument: str, rest: list[str]) -> tuple[str, Any]:
    key, equals, text = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or not key:
        raise ConfigError(f"{argument!r} is not an override", f"usage: {USAGE}")
    if not equals:
        if not rest or rest[0].startswith("--"):
            raise ConfigError(f"--{key} has no value", f"give one: --{key} VALUE (true, false or null, for instance)")
        text = rest.pop(0)
    if not text:
        raise ConfigError(f"--{key} has an empty value", f"use --{key} null for no value")
    return key, parse_value(text, f"--{key}")


def apply_overrides(
    values: Mapping[str, Any], overrides: Mapping[str, Any], choices: Collection[str] = ()
) -> dict[str, Any]:
    """Return ``values`` with each dotted key replaced; a mapping given for a group is merged into it.

    ``choices`` are keys whose value may be a name: with options for it, the name becomes a mapping.
    """
    result = dict(values)
    for key, value in overrides.items():
        inside = next((other for other in overrides if other.startswith(f"{key}.")), None)
        if inside is not None:
            raise ConfigError(f"--{key} and --{inside} both set {inside}", f"put all of it into --{key}")
        groups = key.split(".")
        present: Any = result
        for depth, name in enumerate(groups[:-1], 1):
            present, here = present.get(name), ".".join(groups[:depth])
            if present is None or (isinstance(present, str) and here in choices):
                break
            if not isinstance(present, Mapping):
                raise ConfigError(f"--{key}: {here} is {present!r}, not a group of keys", f"set --{here} itself")
        for name in reversed(groups):
            value = {name: value}
        result = merged(result, value, choices)
    return result
