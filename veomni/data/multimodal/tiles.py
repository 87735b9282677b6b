"""LLaVA, InternVL and Gemma 3: images of one fixed size, and a fixed number of tokens for each."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from PIL.Image import Image
from torch import Tensor

from veomni.data.multimodal.family import Family, MediaFeatures
from veomni.data.multimodal.pixels import Normalization, tiles
from veomni.data.multimodal.processor_rules import Size, from_middles
from veomni.data.multimodal.qwen_vl import CLIP_MEAN, CLIP_STD
from veomni.data.multimodal.videos import Video


class Tiled(Family):
    """Families whose image processor makes tiles of one size."""

    options: ClassVar[Mapping[str, Any]] = {}

    def image(self, image: Image) -> MediaFeatures:
        """Return ``pixel_values`` ``[tiles, 3, height, width]``, still to be rescaled and normalized."""
        raw = {"do_rescale": False, "do_normalize": False}
        made: Any = self.image_processor(images=[image], return_tensors="pt", **raw, **self.options)
        pixels = tiles(made["pixel_values"], Normalization.of(self.image_processor))
        return MediaFeatures({"pixel_values": pixels}, self.text_of(pixels.shape))

    def text_of(self, shape: Sequence[int]) -> str:
        """Return the text of an image of which the pixels have a shape."""
        raise NotImplementedError


class Llava(Tiled):
    """LLaVA 1.5: as many tokens as the encoder has patches; its first feature is the class, unless all are taken."""

    default_processor = "CLIPImageProcessor"

    def __post_init__(self) -> None:
        self.placeholders = {"image": self.token("image_token_id")}

    def image_text(self, width: int, height: int) -> str | None:
        """Return the text of an image's features: the same for all, if the processor makes all equally large."""
        processor = self.image_processor
        size = processor.crop_size if processor.do_center_crop else processor.size
        return self.text_of((size.height, size.width)) if size and size.height and size.width else None

    def text_of(self, shape: Sequence[int]) -> str:
        """Return a token for each patch."""
        encoder = self.config.vision_config
        tokens = (shape[-2] // encoder.patch_size) * (shape[-1] // encoder.patch_size)
        if self.config.vision_feature_select_strategy == "full":
            tokens += encoder.model_type == "clip_vision_model"
        return self.placeholders["image"] * tokens


class InternVL(Tiled):
    """InternVL 3: an image is cut into tiles, a video is a tile per frame; both are ``pixel_values``."""

    default_processor = "GotOcr2ImageProcessor"
    options: ClassVar[Mapping[str, Any]] = {"crop_to_patches": True}
    video_defaults: ClassVar[Mapping[str, Any]] = {
        "size": {"height": 448, "width": 448}, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "num_frames": 8
    }  # fmt: skip

    def __post_init__(self) -> None:
        known: Any = self.tokenizer
        self.placeholders = {"image": self.token("image_token_id"), "video": getattr(known, "video_token", "<video>")}
        self._start = getattr(known, "start_image_token", "<img>")
        self._end = getattr(known, "end_image_token", "</img>")

    def image_text(self, width: int, height: int) -> str:
        """Return the text of an image's features: its shape decides into how many tiles it is cut."""
        return self.text_of([self.image_processor.get_number_of_image_patches(height, width, dict(self.options))])

    def text_of(self, shape: Sequence[int]) -> str:
        """Return the tokens of all tiles between start and end."""
        tokens = self.config.image_seq_length * shape[0]
        return f"{self._start}{self.placeholders['image'] * tokens}{self._end}"

    def sample_frames(self, frames: int, fps: float) -> list[int]:
        """Return the middles of ``num_frames`` equal parts."""
        return from_middles(frames, count=self.video_settings["num_frames"])

    def frame_size(self, frames: int, height: int, width: int) -> Size:
        """Return the size of a tile."""
        size = self.video_settings["size"]
        return size["height"], size["width"]

    def video(self, video: Video) -> MediaFeatures:
        """Return ``pixel_values`` ``[frames, 3, height, width]``."""
        mean, std = self.video_settings["image_mean"], self.video_settings["image_std"]
        pixels = tiles(video.frames, Normalization.of_frames(mean, std))
        text = "\n".join(f"Frame{number}: {self.text_of([1])}" for number in range(1, pixels.shape[0] + 1))
        return MediaFeatures({"pixel_values": pixels}, text)


class Gemma3(Tiled):
    """Gemma 3: the placeholder is the token that begins an image; crops of a long image follow it."""

    default_processor = "Gemma3ImageProcessor"

    def __post_init__(self) -> None:
        self._start, self._token, self._end = (self.token(f"{name}_token_id") for name in ("boi", "image", "eoi"))
        self.placeholders = {"image": self._start}

    def image_text(self, width: int, height: int) -> str | None:
        """Return the text of an image's features: without crops it is the same for all."""
        return None if self.image_processor.do_pan_and_scan else self.text_of([1])

    def text_of(self, shape: Sequence[int]) -> str:
        """Return the tokens of the whole image, then of its crops."""
        whole = f"\n\n{self._start}{self._token * self.config.mm_tokens_per_image}{self._end}\n\n"
        if shape[0] == 1:
            return whole
        cut = " ".join([whole] * (shape[0] - 1))
        return f"Here is the original image {whole} and here are some crops to help you see better {cut}"

    @property
    def unsupervised(self) -> frozenset[int]:
        """Ids of tokens that stand for features, and of those around them."""
        return frozenset(self.id_of(token) for token in (self._start, self._token, self._end))

    def per_token(self, ids: Tensor) -> dict[str, Tensor]:
        """Return ``token_type_ids``: 1 for images."""
        return {"token_type_ids": (ids == self.id_of(self._token)).long()}
