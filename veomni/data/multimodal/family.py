"""What a model family makes of images, videos and audio: the base class and its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from veomni.data.multimodal.frames import VideoDecoder
from veomni.data.multimodal.pixels import PixelList
from veomni.data.multimodal.resizing import Size
from veomni.errors import ConfigError, MediaError, ModelError
from veomni.families.record import RECORDS, family_record

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from veomni.data.multimodal.audio_clip import AudioClip
    from veomni.data.multimodal.videos import Video


@dataclass(frozen=True)
class MediaFeatures:
    """What becomes of one image, video or audio clip.

    Attributes:
        tensors: By the names that the model takes; those of several items are concatenated along the first axis.
            Pixels may still be 8-bit ones.
        text: Takes the place of the placeholder in the rendered conversation.
        source: Says what the features were made of, for messages.
    """

    tensors: Mapping[str, Tensor | PixelList]
    text: str
    source: str = ""


@dataclass(frozen=True)
class FamilyParts:
    """What a family is made of; see :func:`veomni.data.multimodal.processors.build_family`.

    Attributes:
        config: The model's configuration, of the part that is trained (a thinker, say).
        tokenizer: Knows the placeholders by the ids in ``config``.
        image_processor: One of transformers', or None.
        feature_extractor: One of transformers', or None.
        video: Settings of the model's video processor: sizes, mean and standard deviation, sampling.
        use_audio_in_video: Also use the audio track of videos (omni models).
        video_decoder: Decoder of the frames of videos.
    """

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any = None
    feature_extractor: Any = None
    video: Mapping[str, Any] = field(default_factory=dict)
    use_audio_in_video: bool = False
    video_decoder: VideoDecoder = "pyav"


class Family:
    """Turns decoded media into a model's inputs; a subclass has a method per kind that its models take.

    Attributes:
        placeholders: Kind of media to the token that stands for one item in a rendered conversation.
        patches_per_token: Patches of an image or a frame that the tower makes a token of.
        image_processor: Name of a class of transformers, without "Pil", for models that do not name one; None has none.
        video_defaults: Settings of the video processor where the model's files do not say.
    """

    image_processor: ClassVar[str | None] = None
    video_defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, parts: FamilyParts) -> None:
        self.parts = parts
        self.placeholders: dict[str, str] = {}
        self.patches_per_token = 1

    def image(self, image: Image) -> MediaFeatures:
        """Return the features of an RGB image."""
        raise self._has_no("images")

    def image_text(self, width: int, height: int) -> str | None:
        """Return the text of an image's features, of which only the size is known; None if that does not say it."""
        return None

    def video(self, video: Video) -> MediaFeatures:
        """Return the features of a decoded video."""
        raise self._has_no("videos")

    def audio(self, clip: AudioClip) -> MediaFeatures:
        """Return the features of an audio clip at :attr:`sampling_rate`."""
        raise self._has_no("audio clips")

    def generated(self, kind: str, values: Any) -> MediaFeatures:
        """Return what a decoder of the model learns to generate, with an entry per token.

        Args:
            kind: Name of the decoder.
            values: As the record has them.

        Raises:
            ValueError: they are not what it generates.
        """
        raise self._has_no(kind)

    def sample_frames(self, frames: int, fps: float) -> list[int]:
        """Return which of a video's frames are seen.

        Args:
            frames: Number of frames.
            fps: Frames per second.
        """
        raise self._has_no("videos")

    def frame_size(self, frames: int, height: int, width: int) -> Size:
        """Return the size to which the frames of a video are resized.

        Args:
            frames: Number of frames that are seen.
            height: Of a frame.
            width: Of a frame.
        """
        raise self._has_no("videos")

    def per_token(self, ids: Tensor) -> dict[str, Tensor]:
        """Return further inputs with an entry per token: which kind of media each belongs to."""
        return {}

    @classmethod
    def image_processor_of(cls, config: PreTrainedConfig) -> str | None:
        """Return :attr:`image_processor`, or another one that a model's configuration asks for."""
        return cls.image_processor

    @property
    def unsupervised(self) -> frozenset[int]:
        """Ids of tokens that stand for features, on which no loss is taken."""
        return frozenset(self.id_of(token) for token in self.placeholders.values())

    def media_tokens(self, text: str) -> int:
        """Count the tokens in the text of an item that stand for features."""
        convert: Any = self.parts.tokenizer.convert_ids_to_tokens
        return sum(int(text.count(convert(index))) for index in self.unsupervised)

    @property
    def sampling_rate(self) -> int:
        """Samples per second that the feature extractor takes."""
        return int(self.parts.feature_extractor.sampling_rate)

    def token(self, name: str) -> str:
        """Return the token whose id the model's configuration holds under ``name``.

        Raises:
            ModelError: the configuration has no such id, or the tokenizer no such token.
        """
        index = getattr(self.parts.config, name, None)
        token = None if index is None else self.parts.tokenizer.convert_ids_to_tokens(index)
        if not isinstance(token, str):
            kind = self.parts.config.model_type
            problem = f"{kind}: the tokenizer has no token for the model's {name} {index}"
            raise ModelError(problem, "use the tokenizer of the model")
        return token

    def id_of(self, token: str) -> int:
        """Return a token's id."""
        index: Any = self.parts.tokenizer.convert_tokens_to_ids(token)
        return int(index)

    def _has_no(self, what: str) -> MediaError:
        problem = f"{self.parts.config.model_type} models take no {what}"
        return MediaError(problem, "remove the record, or train a model that does")


def family_of(model_type: str) -> type[Family]:
    """Return the class that makes inputs of media for models of a type; its record names it.

    Raises:
        ConfigError: no record of such models names one.
    """
    path = family_record(model_type).media
    if not path:
        known = ", ".join(sorted(name for name, record in RECORDS.items() if record.media))
        fix = f"register a FamilyRecord(media=...); known: {known}"
        raise ConfigError(f"no multimodal family is known for {model_type!r} models", fix)
    found: type[Family] = resolve_name(path)
    return found
