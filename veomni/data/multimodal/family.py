"""What a model family makes of images, videos and audio: the base class of all families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from PIL.Image import Image
from torch import Tensor

from veomni.data.multimodal.audio_clip import AudioClip
from veomni.data.multimodal.frames import VideoDecoder
from veomni.data.multimodal.pixels import PixelList
from veomni.data.multimodal.processor_rules import Size
from veomni.data.multimodal.videos import Video
from veomni.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class MediaFeatures:
    """What becomes of one image, video or audio clip; messages name its ``source``.

    ``tensors`` have the names that the model takes; those of several items are joined along the first axis. ``text``
    takes the place of the placeholder in the rendered conversation.
    """

    tensors: Mapping[str, Tensor | PixelList]
    text: str
    source: str = ""


@dataclass
class Family:
    """Turns decoded media into a model's inputs; a subclass has a method for each kind that its models take.

    Attributes:
        config: The model's configuration, of the component that is trained (a thinker, say).
        tokenizer: Its tokenizer, with a token for each placeholder id in ``config``.
        image_processor: One of transformers', or None; likewise ``feature_extractor``.
        video_settings: Settings of the model's video processor: sizes, mean and standard deviation, sampling.
        use_audio_in_video: As in :class:`MediaSettings`; likewise ``video_decoder``.
        placeholders: Kind of media to the token that stands for one item in a rendered conversation.
        patches_per_token: Patches of an image or a frame that the encoder makes a token of.
        default_processor: Name of a class of transformers, without "Pil", for models that name no image processor.
        video_defaults: Settings of the video processor where the model's files do not say.
    """

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any = None
    feature_extractor: Any = None
    video_settings: Mapping[str, Any] = field(default_factory=dict)
    use_audio_in_video: bool = False
    video_decoder: VideoDecoder = "pyav"
    placeholders: dict[str, str] = field(init=False, default_factory=dict)
    patches_per_token: int = field(init=False, default=1)

    default_processor: ClassVar[str | None] = None
    video_defaults: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        """Set the placeholders."""

    def image(self, image: Image) -> MediaFeatures:
        """Return the features of an RGB image."""
        raise NotImplementedError

    def image_text(self, width: int, height: int) -> str | None:
        """Return the text of an image's features, of which only the size is known; None if that does not say it."""
        return None

    def video(self, video: Video) -> MediaFeatures:
        """Return the features of a decoded video."""
        raise NotImplementedError

    def audio(self, clip: AudioClip) -> MediaFeatures:
        """Return the features of an audio clip at :attr:`sampling_rate`."""
        raise NotImplementedError

    def generated(self, kind: str, values: Any) -> MediaFeatures:
        """Return what the decoder called ``kind`` learns to generate; raises ValueError for values that it cannot."""
        raise NotImplementedError

    def sample_frames(self, frames: int, fps: float) -> list[int]:
        """Return which of a video's frames are seen."""
        raise NotImplementedError

    def frame_size(self, frames: int, height: int, width: int) -> Size:
        """Return the size to which the frames of a video are resized, where ``frames`` of them are seen."""
        raise NotImplementedError

    def per_token(self, ids: Tensor) -> dict[str, Tensor]:
        """Return further inputs with an entry per token: which kind of media each belongs to."""
        return {}

    @classmethod
    def image_processor_of(cls, config: PreTrainedConfig) -> str | None:
        """Return :attr:`default_processor`, or another one that a model's configuration names."""
        return cls.default_processor

    @property
    def unsupervised(self) -> frozenset[int]:
        """Ids of tokens that stand for features, on which no loss is taken."""
        return frozenset(self.id_of(token) for token in self.placeholders.values())

    def media_tokens(self, text: str) -> int:
        """Count the tokens in the text of an item that stand for features."""
        convert: Any = self.tokenizer.convert_ids_to_tokens
        return sum(int(text.count(convert(index))) for index in self.unsupervised)

    @property
    def sampling_rate(self) -> int:
        """Samples per second that the feature extractor takes."""
        return int(self.feature_extractor.sampling_rate)

    def token(self, name: str) -> str:
        """Return the token whose id the model's configuration holds under ``name``; ModelError if there is none."""
        index = getattr(self.config, name, None)
        token = None if index is None else self.tokenizer.convert_ids_to_tokens(index)
        if not isinstance(token, str):
            problem = f"{self.config.model_type}: the tokenizer has no token for the model's {name} {index}"
            raise ModelError(problem, "use the tokenizer of the model")
        return token

    def id_of(self, token: str) -> int:
        """Return a token's id."""
        index: Any = self.tokenizer.convert_tokens_to_ids(token)
        return int(index)
