"""What all sections of the configuration share."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A path as people write it; ``~`` is the home directory."""


class Section(BaseModel):
    """A group of keys: unknown ones are refused, values are not converted (``"3"`` is no integer) and never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )
