"""Multimodal data: images, videos and audio clips read, and what a model family's processor makes of a conversation."""

from veomni.data.multimodal.family import Family as Family
from veomni.data.multimodal.family import MediaFeatures as MediaFeatures
from veomni.data.multimodal.feature_cache import FeatureCache as FeatureCache
from veomni.data.multimodal.limits import MediaLimits as MediaLimits
from veomni.data.multimodal.processors import MediaSettings as MediaSettings
from veomni.data.multimodal.processors import build_family as build_family
from veomni.data.multimodal.processors import settings_of as settings_of
from veomni.data.multimodal.reader import MediaReader as MediaReader
from veomni.data.multimodal.samples import MediaSamples as MediaSamples
from veomni.data.multimodal.samples import SkipBadMedia as SkipBadMedia
from veomni.data.multimodal.transform import MultimodalTransform as MultimodalTransform
from veomni.data.multimodal.transform import PlannedDocument as PlannedDocument
