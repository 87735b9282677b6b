"""What was found about a model, and the one error for what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from veomni.errors import ModelError

if TYPE_CHECKING:
    from veomni.models.traits.trial import Trial


@dataclass(frozen=True)
class Verdict:
    """The result of one examination.

    Attributes:
        ok: Whether the model has the trait.
        reason: Why it has not, or on what the verdict rests where that is not a copy of the whole model.
        measured: The number that decided, where there is one: a relative error.
        found: What was found, where a trait is more than yes or no: a formula, the routers.
    """

    ok: bool
    reason: str = ""
    measured: float | None = None
    found: Any = None


class Trait(Protocol):
    """A property of a model that strategies and passes depend on; an instance holds no state.

    Attributes:
        says: Completes "a model that ...".
        fix: What to change where a model lacks it.
    """

    says: ClassVar[str]
    fix: ClassVar[str]

    def examine(self, trial: Trial) -> Verdict:
        """Examine the model of a trial.

        Raises:
            NoCopyError: it has to be run, and there is no small copy that runs.
        """
        ...


class MissingTraitError(ModelError):
    """A model lacks a trait that something requires of it."""

    @property
    def reason(self) -> str:
        """Why it lacks it, without what requires it."""
        return self.problem.partition(": ")[2]


class ModelTraits(dict[type[Trait], Verdict]):
    """Verdicts about one model, by trait.

    Attributes:
        deferred: Traits whose examination waits for the model itself: see :func:`veomni.models.traits.complete`.
    """

    def __init__(self, verdicts: Mapping[type[Trait], Verdict], deferred: Iterable[type[Trait]] = ()) -> None:
        super().__init__(verdicts)
        self.deferred = tuple(deferred)

    def require(self, *traits: type[Trait], by: str) -> None:
        """Check that the model has traits; a deferred one passes until it has been examined.

        Args:
            traits: What is required.
            by: What requires it, for the message.

        Raises:
            MissingTraitError: the model lacks one.
        """
        for trait in traits:
            verdict = self.get(trait)
            if verdict is not None and not verdict.ok:
                raise MissingTraitError(f"{by} requires a model that {trait.says}: {verdict.reason}", trait.fix)
