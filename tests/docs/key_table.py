"""The reference of all keys, from the schema: ``python -m tests.docs.key_table > docs/configuration_keys.md``."""

from __future__ import annotations

import json
import types
import typing
from typing import Any

from veomni.config import Config
from veomni.config.keys import group, walk

_HEAD = """# All configuration keys

Generated from the schema by `python -m tests.docs.key_table > docs/configuration_keys.md`; a test compares the two.
How keys are given and checked: [configuration](configuration.md).
"""


def page() -> str:
    sections = [_section(key, field) for key, field in walk(Config) if group(field) is not None]
    return "\n".join([_HEAD, *sections])


def _section(key: str, field: Any) -> str:
    rows = [row(f"{key}.{name}", inner) for name, inner in plain_keys(field)]
    head = [f"## {key}", "", str(field.description), "", "| key | values | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def plain_keys(field: Any) -> list[tuple[str, Any]]:
    return [(name, inner) for name, inner in group(field).model_fields.items() if group(inner) is None]


def row(key: str, field: Any) -> str:
    default = "required" if field.is_required() else code(field.get_default(call_default_factory=True))
    return f"| `{key}` | {values(field.annotation)} | {default} | {field.description} |"


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
