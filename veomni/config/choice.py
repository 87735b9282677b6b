"""Keys that choose a component of a registry: its name, or a mapping of its name and its options."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from veomni.config.base import Section
from veomni.config.section import ComponentSection, section_of
from veomni.errors import ConfigError
from veomni.registry import Registry


def configured(default: Any, description: str) -> Any:
    """Return a field whose default is given as YAML has it: a name, or a mapping of options."""
    return Field(default=default, description=description)


class Options:
    """Marks a field whose value is the section of ``component``; the run gives the arguments ``supplied``."""

    def __init__(self, component: Any, **supplied: str) -> None:
        self.component, self.supplied = component, supplied

    def sections(self) -> dict[str, type[Section]]:
        """Return the section by the component's name."""
        return {self.component.__name__: section_of(self.component, supplied=frozenset(self.supplied))}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        [section] = self.sections().values()
        return handler.generate_schema(section)


class Choice:
    """Marks a field whose value is the section of a registered component.

    Args:
        base: Keys and methods that all its sections share.
        default: Name that a mapping without one means.
        sibling: Key beside this one that holds the name; None where the value holds it.
        kind: Class that the components must be of.
        supplied: Arguments that the run gives, and the key that each comes from ("" for none).
    """

    def __init__(
        self,
        registry: Registry[Any],
        *,
        base: type[ComponentSection] = ComponentSection,
        default: str | None = None,
        sibling: str | None = None,
        kind: type | None = None,
        **supplied: str,
    ) -> None:
        self.registry, self.base, self.default, self.sibling, self.kind = registry, base, default, sibling, kind
        self.supplied, self.by_name = supplied, sibling is None

    def section(self, name: str) -> type[ComponentSection]:
        """Return the section of the component called ``name``."""
        shown, supplied = None if self.sibling else name, frozenset(self.supplied)
        return section_of(self.registry.get(name), name=shown, supplied=supplied, base=self.base)

    def sections(self) -> dict[str, type[Section]]:
        """Return the sections of all components that can be chosen; packages that cannot be imported are left out."""
        found: dict[str, type[Section]] = {}
        for name in self.registry:
            with suppress(ConfigError):
                section = self.section(name)
                component: Any = section.component
                if self.kind is None or (isinstance(component, type) and issubclass(component, self.kind)):
                    found[name] = section
        return found

    def _validate(self, value: Any, info: ValidationInfo) -> Section:
        if isinstance(value, Section):
            return value
        options = {"name": value} if isinstance(value, str) and not self.sibling else value
        if not isinstance(options, Mapping):
            raise PydanticCustomError("dict_type", "a mapping of keys")
        if self.sibling is None:
            name = options.get("name", self.default)
        elif (name := info.data.get(self.sibling)) is None:  # its own error is reported
            return Section()
        if not isinstance(name, str):
            raise PydanticCustomError("missing_name", "a name, or a mapping with a name")
        section = self.section(check_name(self.registry, name))
        # null takes an option of another component away: a file names one, the command line chooses this one.
        known = {key: item for key, item in options.items() if item is not None or key in section.model_fields}
        return section.model_validate(known)

    def _dump(self, value: Section) -> Any:
        plain = value.model_dump()
        return plain["name"] if list(plain) == ["name"] else plain

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        dumped = core_schema.plain_serializer_function_ser_schema(self._dump)
        return core_schema.with_info_plain_validator_function(self._validate, serialization=dumped)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        names = [] if self.sibling else [{"enum": list(self.registry)}]
        return {"anyOf": [*names, *(section.model_json_schema() for section in self.sections().values())]}


def check_name(names: Collection[str], name: str) -> str:
    """Return ``name`` when it is one of ``names``, for a validator of pydantic."""
    if name not in names:
        known = ", ".join(repr(entry) for entry in names)
        raise PydanticCustomError("unknown_name", "{known}", {"known": f"one of {known}"})
    return name


class Name:
    """Marks a text that must be a name in a registry, or one of ``others``."""

    def __init__(self, registry: Registry[Any], *others: str) -> None:
        self.registry, self.others = registry, others

    def names(self) -> list[str]:
        """Return the names that are allowed."""
        return [*self.registry, *self.others]

    def _validate(self, value: str) -> str:
        return check_name(self.names(), value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._validate, handler(source))
