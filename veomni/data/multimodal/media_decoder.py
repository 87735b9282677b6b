"""From an item of a conversation to its features: read, decoded, processed, and kept in the cache."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from veomni.data.multimodal.audio_clip import AudioClip, load_audio, mono
from veomni.data.multimodal.family import Family, MediaFeatures
from veomni.data.multimodal.feature_cache import FeatureCache
from veomni.data.multimodal.images import load_image, upright_size
from veomni.data.multimodal.reader import MediaReader
from veomni.data.multimodal.videos import VideoReading, load_video
from veomni.data.sources.media_records import MediaItem
from veomni.errors import MediaError
from veomni.families.omni import DECODERS

T = TypeVar("T")


@dataclass(frozen=True)
class PlannedMedia:
    """An image, video or audio clip whose tokens are known, and its features if these were needed to know them."""

    item: MediaItem
    text: str
    features: MediaFeatures | None = None


@dataclass
class MediaDecoder:
    """Makes features of images, videos and audio clips, which ``cache`` keeps between epochs and runs."""

    family: Family
    reader: MediaReader
    cache: FeatureCache | None = None

    def plan(self, item: MediaItem) -> PlannedMedia:
        """Return an item with its text: of an image the header is enough, others are decoded (MediaError: unusable)."""
        if item.kind not in self.family.placeholders:
            problem = f"{item.where}: {self.family.config.model_type} models take no {item.kind}"
            raise MediaError(problem, "remove the record")
        return _named(item, self._planned)

    def decode(self, planned: PlannedMedia) -> PlannedMedia:
        """Return an item with its features (MediaError: unusable, or another one than when it was planned)."""
        if planned.features is not None:
            return planned
        features = _named(planned.item, self._features)
        if features.text != planned.text:
            problem = f"{planned.item.where}: it is not as large as it was, or as its header says"
            raise MediaError(problem, "leave data as it is while it is read")
        return replace(planned, features=features)

    def _planned(self, item: MediaItem) -> PlannedMedia:
        if item.kind == "image":
            name, content = "an opened image", item.reference
            if not _is_opened(item):
                name, content = self.reader(item.reference)
                if self.reader.is_remote(item.reference):  # fetched once
                    item = replace(item, reference={"bytes": content, "path": name})
            text = self.family.image_text(*upright_size(content, name, self.reader.limits))
            if text is not None:
                return PlannedMedia(item, text)
        features = self._features(item)
        return PlannedMedia(item, features.text, features)

    def _features(self, item: MediaItem) -> MediaFeatures:
        if item.kind in DECODERS:
            return self.family.generated(item.kind, item.reference)
        if _is_opened(item):
            return self._image(item.reference, "an opened image")
        if item.kind == "audio" and isinstance(item.reference, Mapping) and item.reference.get("array") is not None:
            return self._decoded_audio(item.reference)
        name, content = self.reader(item.reference)
        if self.cache is None:
            return self._from_bytes(item.kind, content, name)
        path = self.cache.path(item.kind, content)
        features = self.cache.read(path)
        if features is None:
            features = self._from_bytes(item.kind, content, name)
            self.cache.write(path, features)
        return features

    def _from_bytes(self, kind: str, content: bytes, name: str) -> MediaFeatures:
        if kind == "image":
            return self._image(content, name)
        if kind == "audio":
            return self._audio(load_audio(content, name, self.family.sampling_rate, self.reader.limits))
        return self._video(content, name)

    def _image(self, content: Any, name: str) -> MediaFeatures:
        image = load_image(content, name, self.reader.limits)
        return replace(self.family.image(image), source=f"{image.width} x {image.height} pixels")

    def _audio(self, clip: AudioClip) -> MediaFeatures:
        return replace(self.family.audio(clip), source=f"{len(clip.samples) / clip.rate:.2f} s of audio")

    def _decoded_audio(self, reference: Mapping[str, Any]) -> MediaFeatures:
        """Return the features of a clip that `datasets` has decoded."""
        name, rate = "a decoded audio clip", int(reference["sampling_rate"])
        samples = np.atleast_2d(np.asarray(reference["array"], np.float32))
        self.reader.limits.check_duration(name, samples.shape[-1] / rate)
        return self._audio(mono(samples, name, rate, self.family.sampling_rate))

    def _video(self, content: bytes, name: str) -> MediaFeatures:
        family = self.family
        rate = family.sampling_rate if family.use_audio_in_video else None
        reading = VideoReading(family.sample_frames, family.frame_size, rate, family.video_decoder)
        video = load_video(content, name, reading, self.reader.limits)
        audio = "" if video.audio is None else f", with {len(video.audio.samples) / video.audio.rate:.2f} s of audio"
        height, width = video.frames.shape[-2:]
        seen = f"{len(video.indices)} of {video.total} frames at {video.fps:g} per second, to {width} x {height}"
        return replace(family.video(video), source=f"{seen}{audio}")


def _named(item: MediaItem, make: Callable[[MediaItem], T]) -> T:
    """Return what is made of an item; errors name it."""
    try:
        return make(item)
    except MediaError as error:
        raise MediaError(f"{item.where}: {error.problem}", error.fix, error.field) from error
    except ValueError as error:  # transformers' processors reject what they cannot resize
        raise MediaError(f"{item.where}: the {item.kind} is rejected: {error}", "remove the record") from error


def _is_opened(item: MediaItem) -> bool:
    """Whether an item is an image of Pillow already, as `datasets` gives it."""
    return item.kind == "image" and hasattr(item.reference, "getexif")
