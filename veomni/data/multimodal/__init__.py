"""Multimodal data: images, videos and sounds read, and what a model family's processor makes of a conversation."""

from veomni.data.multimodal import glm4v, qwen_audio, qwen_omni, qwen_vl, tiles  # each registers its families
from veomni.data.multimodal.family import FAMILIES, Family, FamilyParts, MediaFeatures
from veomni.data.multimodal.limits import MediaLimits
from veomni.data.multimodal.processors import MediaSettings, build_family
from veomni.data.multimodal.reader import MediaReader
from veomni.data.multimodal.transform import MultimodalTransform

__all__ = [
    "FAMILIES",
    "Family",
    "FamilyParts",
    "MediaFeatures",
    "MediaLimits",
    "MediaReader",
    "MediaSettings",
    "MultimodalTransform",
    "build_family",
    "glm4v",
    "qwen_audio",
    "qwen_omni",
    "qwen_vl",
    "tiles",
]
