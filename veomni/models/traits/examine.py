"""Examine a model once, at set-up."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from veomni.logging import create_logger
from veomni.models.traits.trial import NoCopyError, Trial
from veomni.models.traits.verdict import ModelTraits, Trait, Verdict

logger = create_logger(__name__)


def examine_model(model: nn.Module, traits: Iterable[type[Trait]]) -> ModelTraits:
    """Examine a model before it is sharded; it is read and never changed, and no other rank takes part.

    Args:
        model: Any module; its parameters may be on the meta device.
        traits: What to look for.

    Returns:
        A verdict for each trait. Those that run the model are deferred where it has no small copy: its own forward was
        replaced, or it is large and its configuration cannot be shrunk. :func:`complete` examines these.
    """
    trial, found, deferred = Trial(model), dict[type[Trait], Verdict](), list[type[Trait]]()
    for trait in traits:
        try:
            found[trait] = trait().examine(trial)
        except NoCopyError as error:
            deferred.append(trait)
            logger.info_rank0("%s is examined after it is sharded: %s", trial.name, error)
    return ModelTraits(found, deferred)


def complete(traits: ModelTraits, model: nn.Module, body: nn.Module, device: torch.device) -> ModelTraits:
    """Examine what was deferred on the model itself; collective, and the model is left as it was.

    Args:
        traits: What :func:`examine_model` returned.
        model: What users call; its parameters have values.
        body: The module inside that was examined.
        device: Where the model computes.
    """
    trial, found = Trial(body, itself=(model, device)), dict(traits)
    for trait in traits.deferred:
        found[trait] = trait().examine(trial)
    return ModelTraits(found)
