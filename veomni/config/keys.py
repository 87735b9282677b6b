"""The dotted names of the schema: ``train.optimizer.lr`` and its like."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def walk(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key and its field, groups first; those of some components only are described with their names."""
    for name, field in schema.model_fields.items():
        key = f"{prefix}{name}"
        yield key, field
        found = groups(field)
        if len(found) == 1:
            yield from walk(next(iter(found.values())), f"{key}.")
            continue
        for inner, item in _merged(found).items():
            yield f"{key}.{inner}", _name_field(list(found), field.default) if inner == "name" else item


def groups(field: FieldInfo) -> Mapping[str, type[BaseModel]]:
    """Return the models that a field's value may be, by the name that chooses each; empty for a plain value."""
    for item in field.metadata:
        if hasattr(item, "sections"):
            return item.sections()
    annotation = field.annotation
    return {"": annotation} if isinstance(annotation, type) and issubclass(annotation, BaseModel) else {}


def _merged(found: Mapping[str, type[BaseModel]]) -> dict[str, FieldInfo]:
    having: dict[str, dict[str, FieldInfo]] = {}
    for name, section in found.items():
        for key, field in section.model_fields.items():
            having.setdefault(key, {})[name] = field
    return {key: _common(fields, len(found)) for key, fields in having.items()}


def _name_field(names: list[str], default: Any) -> FieldInfo:
    return FieldInfo(annotation=cast("Any", Literal[tuple(names)]), default=default, description="Which one it is.")


def _common(fields: Mapping[str, FieldInfo], sections: int) -> FieldInfo:
    """Return one field for a key that ``fields`` of ``sections`` sections have, by the name that chooses each."""
    first = next(iter(fields.values()))
    if len(fields) == sections:
        return first
    if len({field.description for field in fields.values()}) == 1:
        text = f"{', '.join(fields)}: {first.description}"
    else:
        defaults = {n: "" if f.default == first.default else f" Default {f.default}." for n, f in fields.items()}
        text = " ".join(f"{name}: {field.description}{defaults[name]}" for name, field in fields.items())
    return FieldInfo(annotation=first.annotation, default=first.default, description=text)


def choices(schema: type[BaseModel]) -> set[str]:
    """Return the keys whose value is the name of a component, or a mapping of its name and options."""
    return {key for key, field in walk(schema) if any(getattr(item, "by_name", False) for item in field.metadata)}


def entry_keys(schema: type[BaseModel], key: str) -> list[str]:
    """Return the keys of any entry of the list ``key``."""
    field = dict(walk(schema)).get(key)
    if field is None:
        return []
    sections = [
        section for kind in get_args(field.annotation) for section in groups(FieldInfo.from_annotation(kind)).values()
    ]
    return list(dict.fromkeys(name for section in sections for name in section.model_fields))


def all_keys(schema: type[BaseModel]) -> list[str]:
    """Return every key, groups included."""
    return [key for key, _ in walk(schema)]
