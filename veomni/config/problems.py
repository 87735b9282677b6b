"""All that is wrong with a configuration, in one error."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from veomni.config.keys import all_keys, entry_keys
from veomni.errors import ConfigError, InputError
from veomni.registry import did_you_mean

_WANTED = {"model_type": "a mapping of keys", "dict_type": "a mapping of keys", "string_type": "a string, in quotes"}


class Problem(NamedTuple):
    """One thing that is wrong, what to do about it, and the Python argument it is about, if any."""

    problem: str
    fix: str
    field: str = ""


def raise_problems(problems: Iterable[Problem], source: str, kind: type[InputError] = ConfigError) -> None:
    """Raise one error of class ``kind`` that holds all ``problems`` found in ``source``, if there are any."""
    found = list(problems)
    if not found:
        return
    if len(found) == 1:
        raise kind(*found[0])
    lines = "".join(f"\n  {number}. {item.problem}: {item.fix}" for number, item in enumerate(found, 1))
    problem, fields = f"{source} has {len(found)} problems:{lines}", " ".join(item.field for item in found)
    raise kind(problem, "correct them all; `veomni schema` describes every key", fields)


def explain(error: ValidationError, schema: type[BaseModel], places: Mapping[str, str]) -> list[Problem]:
    """Return pydantic's findings by key; ``places`` are where keys were given ("tiny.yaml:12"), by dotted path."""
    by_key: dict[str, list[Mapping[str, Any]]] = {}
    known = all_keys(schema)
    for item in error.errors(include_url=False):
        by_key.setdefault(_key(item["loc"], item["type"], known), []).append(item)
    return [_problem(key, items, schema, places) for key, items in by_key.items()]


def _key(location: tuple[int | str, ...], kind: str, known: list[str]) -> str:
    """Return the dotted path without the names of union members that pydantic appends, but with entries of lists."""
    if kind == "extra_forbidden":
        return ".".join(str(part) for part in location)
    key = ""
    for index, part in enumerate(location):
        if isinstance(part, int) and isinstance(location[-1], str) and index + 1 < len(location):
            return f"{key}.{part}.{location[index + 1]}"
        longer = f"{key}.{part}" if key else str(part)
        if longer not in known:
            break
        key = longer
    return key


def _problem(key: str, items: list[Mapping[str, Any]], schema: type[BaseModel], places: Mapping[str, str]) -> Problem:
    place = f" ({places[key]})" if key in places else ""
    if items[0]["type"] == "extra_forbidden":
        here = " of the component that is chosen" if key in all_keys(schema) else ""
        return Problem(f"{key}{place} is not a key{here}", _fix_unknown(key, schema))
    if items[0]["type"] == "missing":
        in_entry = any(part.isdigit() for part in key.split("."))
        fix = "add it to that entry" if in_entry else f"set it in the file or by --{key} VALUE"
        return Problem(f"{key} is missing", fix)
    wanted = " or ".join(dict.fromkeys(_wanted(item) for item in items))
    return Problem(f"{key}{place} is {_shown(items[0]['input'])}", f"give {wanted}")


def _fix_unknown(key: str, schema: type[BaseModel]) -> str:
    if key in (renamed := getattr(schema, "RENAMED", {})):
        return f"it is now {renamed[key]}"
    keys = [known.rpartition(".") for known in all_keys(schema)]
    parent, _, name = given = key.rpartition(".")
    if given in keys:
        return f"leave it out (--{key} null), or choose a component of {parent} that has it"
    of_list, _, entry = parent.rpartition(".")
    if entry.isdigit():
        return did_you_mean(name, entry_keys(schema, of_list))
    elsewhere = ["".join(known) for known in keys if known[2] == name]
    siblings = [known[2] for known in keys if known[0] == parent]
    entries = "" if siblings else f"leave it out: `veomni schema` describes the keys of {parent.partition('.0')[0]}"
    return f"did you mean {elsewhere[0]!r}?" if elsewhere else did_you_mean(name, siblings, entries)


def _wanted(item: Mapping[str, Any]) -> str:
    message = str(item["msg"]).removeprefix("Input should be ").removeprefix("Value should ")
    return _WANTED.get(item["type"], message[:1].lower() + message[1:])


def _shown(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
