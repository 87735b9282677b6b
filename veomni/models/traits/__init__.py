"""What one examination of a model finds; strategies name what they require."""

from veomni.models.traits.examine import MissingTraitError, examine_model
from veomni.models.traits.head import FusesHead
from veomni.models.traits.rows import PassesDocuments, RunsOnShards, SplitsRows
from veomni.models.traits.trial import Trait

__all__ = ["FusesHead", "MissingTraitError", "PassesDocuments", "RunsOnShards", "SplitsRows", "Trait", "examine_model"]
