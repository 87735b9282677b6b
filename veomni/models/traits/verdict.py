"""What a trait is, and what was found about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from veomni.models.traits.trial import Trial


@dataclass(frozen=True)
class Verdict:
    """The result of one examination.

    Attributes:
        ok: Whether the model has the trait.
        reason: Why it has not, or on what the verdict rests where that is not a copy of the whole model.
        found: What was found, where a trait is more than yes or no: a formula, the routers.
        fix: What to change, where that is not the trait's own fix.
    """

    ok: bool
    reason: str = ""
    found: Any = None
    fix: str = ""


class Trait(Protocol):
    """A property of a model that strategies and passes depend on; an instance holds no state.

    Attributes:
        says: Completes "a model that ...".
        fix: What to change where a model lacks it.
    """

    says: ClassVar[str]
    fix: ClassVar[str]

    def examine(self, trial: Trial) -> Verdict:
        """Examine the model of a trial; NoCopyError where it has to be run, and no small copy runs."""
        ...


class NoCopyError(Exception):
    """A trait can be examined on the model itself only; the message says why, unless that is true of any model."""
