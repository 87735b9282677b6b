"""Multimodal data: images, videos and audio clips read, and what a model family's processor makes of a conversation."""

from veomni.data.multimodal.family import Family, FamilyParts, MediaFeatures
from veomni.data.multimodal.feature_cache import FeatureCache
from veomni.data.multimodal.limits import MediaLimits
from veomni.data.multimodal.processors import MediaSettings, build_family, settings_of
from veomni.data.multimodal.reader import MediaReader
from veomni.data.multimodal.samples import MediaSamples
from veomni.data.multimodal.skipping import SkipBadMedia
from veomni.data.multimodal.transform import EncodedDocument, MultimodalTransform

__all__ = [
    "EncodedDocument",
    "Family",
    "FamilyParts",
    "FeatureCache",
    "MediaFeatures",
    "MediaLimits",
    "MediaReader",
    "MediaSamples",
    "MediaSettings",
    "MultimodalTransform",
    "SkipBadMedia",
    "build_family",
    "settings_of",
]
