"""What all sections of the configuration share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from veomni.config.problems import Problem

PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A path as people write it; ``~`` is the home directory."""


class Section(BaseModel):
    """A group of keys: unknown ones are rejected, values are not converted (``"3"`` is no integer) and never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    configures: ClassVar[tuple[str, ...]] = ()
    """Classes and functions whose arguments are the keys of this section."""
    renames: ClassVar[Mapping[str, str]] = {}
    """Their arguments that have another name ("Packing.strategy"), and the keys."""

    def problems(self, config: Any, world: int | None) -> Iterator[Problem]:
        """Yield what is wrong with this section beside the others; files, devices and the model are not looked at.

        Args:
            config: The whole configuration.
            world: Ranks over all nodes; None while that is not known.
        """
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
