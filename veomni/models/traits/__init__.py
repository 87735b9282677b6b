"""What one examination of a model finds; strategies name what they require."""

from veomni.models.traits.documents import PassesDocuments
from veomni.models.traits.examine import complete, examine_model
from veomni.models.traits.head import FusesHead
from veomni.models.traits.rows import SplitsRows
from veomni.models.traits.trial import NoCopyError, Trial
from veomni.models.traits.verdict import MissingTraitError, ModelTraits, Trait, Verdict

__all__ = [
    "FusesHead",
    "MissingTraitError",
    "ModelTraits",
    "NoCopyError",
    "PassesDocuments",
    "SplitsRows",
    "Trait",
    "Trial",
    "Verdict",
    "complete",
    "examine_model",
]
