"""What one examination of a model finds; strategies name what they require."""

from veomni.models.traits.examine import MissingTraitError, ModelTraits, examine_model
from veomni.models.traits.head import FusesHead
from veomni.models.traits.rows import PassesDocuments, RunsOnShards, SplitsRows
from veomni.models.traits.trial import Trial
from veomni.models.traits.verdict import NoCopyError, Trait, Verdict

__all__ = [
    "FusesHead",
    "MissingTraitError",
    "ModelTraits",
    "NoCopyError",
    "PassesDocuments",
    "RunsOnShards",
    "SplitsRows",
    "Trait",
    "Trial",
    "Verdict",
    "examine_model",
]
