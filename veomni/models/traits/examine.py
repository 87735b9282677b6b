"""Examine a model once, at set-up; what that takes the values of the model for, when it has them."""

from collections.abc import Iterable
from typing import Self

import torch
from torch import nn

from veomni.errors import ModelError
from veomni.logging import create_logger
from veomni.models.traits.trial import NoCopyError, Trait, Trial, Verdict

logger = create_logger(__name__)


class MissingTraitError(ModelError):
    """A model lacks a trait that something requires of it."""

    @property
    def reason(self) -> str:
        """Why it lacks it, without what requires it."""
        return self.problem.partition(": ")[2]


class ModelTraits(dict[type[Trait], Verdict]):
    """Verdicts about one model, by trait; traits that are ``deferred`` wait for :meth:`complete`."""

    deferred: tuple[type[Trait], ...] = ()

    def examine(self, trial: Trial, traits: Iterable[type[Trait]]) -> Self:
        """Examine the model of a trial, in one random state and without gradients."""
        self.deferred = ()
        with trial.running():
            for trait in traits:
                try:
                    self[trait] = trait().examine(trial)
                except NoCopyError as error:
                    self.deferred += (trait,)
                    if str(error):
                        logger.info_rank0("%s is examined after it is sharded: %s", trial.name, error)
        return self

    def complete(self, model: nn.Module, body: nn.Module, device: torch.device) -> None:
        """Examine what was deferred on the ``body`` inside of ``model``, once it has values; collective."""
        if self.deferred:
            self.examine(Trial(body, model, device), self.deferred)

    def require(self, *traits: type[Trait], by: str) -> None:
        """Check that the model has what is required ``by`` something (MissingTraitError); a deferred trait passes."""
        for trait in traits:
            verdict = self.get(trait)
            if verdict is not None and not verdict.ok:
                problem = f"{by} requires a model that {trait.says}: {verdict.reason}"
                raise MissingTraitError(problem, verdict.fix or trait.fix)


def examine_model(model: nn.Module, traits: Iterable[type[Trait]]) -> ModelTraits:
    """Examine a model before it is sharded; it is read and never changed, and no other rank takes part.

    Traits that run the model are deferred where it has no small copy: its own forward was replaced, or it is large and
    its configuration cannot be shrunk.
    """
    return ModelTraits().examine(Trial(model), traits)
