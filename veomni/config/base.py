"""What all sections of the configuration share."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from veomni.config.problems import Problem

T = TypeVar("T")

PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A path as people write it; ``~`` is the home directory."""


class Section(BaseModel):
    """A group of keys: unknown ones are rejected, values are not converted (``"3"`` is no integer) and never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split())  # docstrings of attributes have lines

    configures: ClassVar[tuple[str, ...]] = ()
    """Classes and functions whose arguments are the keys of this section."""
    renames: ClassVar[Mapping[str, str]] = {}
    """Their arguments that have another name ("Packing.strategy"), and the keys."""

    def make(self, component: Callable[..., T], **given: Any) -> T:
        """Return what one of the components in :attr:`configures` makes of these keys and of ``given``."""
        for argument in inspect.signature(component).parameters:
            key = self.renames.get(f"{component.__name__}.{argument}", argument)
            if argument not in given and key in type(self).model_fields:
                given[argument] = getattr(self, key)
        return component(**given)

    def problems(self, config: Any, world: int | None) -> Iterator[Problem]:
        """Yield what is wrong with this section beside the others, on ``world`` ranks, or on any number; no files."""
        return iter(())

    def path_problems(self) -> Iterator[Problem]:
        """Yield which files and directories that this section names cannot be used; nothing is written."""
        return iter(())

    def sections(self) -> Iterator[Section]:
        """Yield this section and those in it."""
        yield self
        for name in type(self).model_fields:
            value = getattr(self, name)
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Section):
                    yield from item.sections()
