"""How a name that another package does not export is declared: once, beside the only code that uses it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PrivateName:
    """A name that veomni relies on although its package does not promise to keep it.

    A module that uses such names lists them in ``PRIVATE``; a contract test resolves all of them, and their
    parameters, on both ends of the supported range.

    Attributes:
        path: ``module:qualified.name``; of an attribute that only instances have, ``module:Class().name``.
        reason: What it is used for.
        without: What happens under a release that lacks it.
        parameters: The parameters that are passed, by name.
        since: The first release that has it, where that is not the oldest supported one.
    """

    path: str
    reason: str
    without: str
    parameters: tuple[str, ...] = ()
    since: str | None = None

    def resolve(self) -> Any:
        """Return the object.

        Raises:
            AttributeError: the installed release lacks it.
        """
        module, _, names = self.path.partition(":")
        found: Any = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name.removesuffix("()"))
            found = found() if name.endswith("()") else found
        return found
