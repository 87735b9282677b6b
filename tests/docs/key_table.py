"""The reference of all keys, from the schema: ``python -m tests.docs.key_table > docs/configuration_keys.md``."""

from __future__ import annotations

import json
import types
import typing
from typing import Any

from pydantic.fields import FieldInfo

from veomni.config.choice import Name
from veomni.config.keys import groups, walk
from veomni.run_config import Config

_HEAD = """# All configuration keys

Generated from the schema by `python -m tests.docs.key_table > docs/configuration_keys.md`; a test compares the two.
How keys are given and checked: [configuration](configuration.md).
"""


def page() -> str:
    tables: dict[str, tuple[FieldInfo, list[str]]] = {}
    for key, field in walk(Config):
        parent, _, _ = key.rpartition(".")
        if groups(field):
            tables[key] = (field, [])
        elif parent in tables:
            tables[parent][1].append(row(key, field))
    return "\n".join([_HEAD, *(_section(key, *table) for key, table in tables.items())])


def _section(key: str, field: FieldInfo, rows: list[str]) -> str:
    chosen = ", ".join(code(name) for name in groups(field) if len(groups(field)) > 1)
    text = f"{field.description} One of {chosen}." if chosen else str(field.description)
    table = ["| key | values | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else []
    return "\n".join([f"## {key}", "", text, "", *table])


def row(key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else code(field.get_default(call_default_factory=True))
    names = [code(name) for mark in field.metadata if isinstance(mark, Name) for name in mark.names()]
    text = " ".join(str(field.description).split())
    return f"| `{key}` | {', '.join(names) or values(field.annotation)} | {default} | {text} |"


def code(value: Any) -> str:
    return f"`{json.dumps(value) if not isinstance(value, str) else value}`"


def values(annotation: Any) -> str:
    """Return the kinds of value an annotation allows, in words that fit a table."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return values(parts[0])
    if origin in (types.UnionType, typing.Union):
        return ", ".join(dict.fromkeys(values(part) for part in parts))
    if origin is typing.Literal:
        return ", ".join(code(part) for part in parts)
    if origin is list:
        return f"list of {values(parts[0])}"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(annotation, "mapping")


if __name__ == "__main__":
    print(page(), end="")
