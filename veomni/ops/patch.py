"""How operations replace attributes of a model: through a function, so that an adapter can undo it."""

from collections.abc import Callable
from typing import Any

PatchAttribute = Callable[[Any, str, Any], None]
"""Replaces the attribute of an object."""
