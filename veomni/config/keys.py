"""The dotted names of the schema: ``train.optimizer.lr`` and its like."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def walk(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key and its field, groups before what is in them."""
    for name, field in schema.model_fields.items():
        key = f"{prefix}{name}"
        yield key, field
        if group(field) is not None:
            yield from walk(group(field), f"{key}.")  # type: ignore[arg-type]


def group(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model that a field's value is; None for a plain value."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


@functools.cache
def all_keys(schema: type[BaseModel]) -> list[str]:
    """Return every key, groups included."""
    return [key for key, _ in walk(schema)]


def children(schema: type[BaseModel], parent: str) -> list[str]:
    """Return the names directly under the group ``parent``; "" is the top."""
    start = f"{parent}." if parent else ""
    names = (key.removeprefix(start) for key in all_keys(schema) if key.startswith(start))
    return [name for name in names if "." not in name]
