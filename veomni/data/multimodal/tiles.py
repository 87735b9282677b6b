"""LLaVA, InternVL and Gemma 3: images of one fixed size, and a fixed number of tokens for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from veomni.data.multimodal.family import Family, MediaFeatures
from veomni.data.multimodal.pixels import Normalization, PixelList, tiles
from veomni.data.multimodal.processor_rules import Size, from_middles
from veomni.data.multimodal.qwen_vl import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from PIL.Image import Image

    from veomni.data.multimodal.videos import Video


class Llava(Family):
    """LLaVA 1.5: as many tokens as the tower has patches; its first feature is the class, unless all are taken."""

    default_processor = "CLIPImageProcessor"

    def __post_init__(self) -> None:
        self.placeholders = {"image": self.token("image_token_id")}

    def image(self, image: Image) -> MediaFeatures:
        """Return ``pixel_values`` ``[1, 3, height, width]``."""
        pixels = _pixels(self.image_processor, image)
        return MediaFeatures({"pixel_values": pixels}, self._tokens(*pixels.shape[-2:]))

    def image_text(self, width: int, height: int) -> str | None:
        """Return the text of an image's features: the same for all, if the processor makes all equally large."""
        processor = self.image_processor
        size = processor.crop_size if processor.do_center_crop else processor.size
        return self._tokens(size.height, size.width) if size and size.height and size.width else None

    def _tokens(self, height: int, width: int) -> str:
        tower = self.config.vision_config
        tokens = (height // tower.patch_size) * (width // tower.patch_size)
        if self.config.vision_feature_select_strategy == "full":
            tokens += tower.model_type == "clip_vision_model"
        return self.placeholders["image"] * tokens


class InternVL(Family):
    """InternVL 3: an image is cut into tiles, a video is a tile per frame; both are ``pixel_values``."""

    default_processor = "GotOcr2ImageProcessor"
    video_defaults: ClassVar[Mapping[str, Any]] = {
        "size": {"height": 448, "width": 448}, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "num_frames": 8
    }  # fmt: skip

    def __post_init__(self) -> None:
        known: Any = self.tokenizer
        self.placeholders = {"image": self.token("image_token_id"), "video": getattr(known, "video_token", "<video>")}
        self._start = getattr(known, "start_image_token", "<img>")
        self._end = getattr(known, "end_image_token", "</img>")

    def image(self, image: Image) -> MediaFeatures:
        """Return ``pixel_values`` ``[tiles, 3, height, width]``."""
        pixels = _pixels(self.image_processor, image, crop_to_patches=True)
        return MediaFeatures({"pixel_values": pixels}, self._tiles(pixels.shape[0]))

    def image_text(self, width: int, height: int) -> str:
        """Return the text of an image's features: its shape decides into how many tiles it is cut."""
        processor = self.image_processor
        return self._tiles(processor.get_number_of_image_patches(height, width, {"crop_to_patches": True}))

    def sample_frames(self, frames: int, fps: float) -> list[int]:
        """Return the middles of ``num_frames`` equal parts."""
        return from_middles(frames, count=self.video_settings["num_frames"])

    def frame_size(self, frames: int, height: int, width: int) -> Size:
        """Return the size of a tile."""
        size = self.video_settings["size"]
        return size["height"], size["width"]

    def video(self, video: Video) -> MediaFeatures:
        """Return ``pixel_values`` ``[frames, 3, height, width]``."""
        settings = self.video_settings
        pixels = tiles(video.frames, Normalization.of_frames(settings["image_mean"], settings["image_std"]))
        text = "\n".join(f"Frame{number}: {self._tiles(1)}" for number in range(1, pixels.shape[0] + 1))
        return MediaFeatures({"pixel_values": pixels}, text)

    def _tiles(self, count: int) -> str:
        tokens = self.config.image_seq_length * count
        return f"{self._start}{self.placeholders['image'] * tokens}{self._end}"


class Gemma3(Family):
    """Gemma 3: the placeholder is the token that begins an image; crops of a long image follow it."""

    default_processor = "Gemma3ImageProcessor"

    def __post_init__(self) -> None:
        self._start, self._token, self._end = (self.token(f"{name}_token_id") for name in ("boi", "image", "eoi"))
        self.placeholders = {"image": self._start}

    def image(self, image: Image) -> MediaFeatures:
        """Return ``pixel_values`` ``[1 + crops, 3, height, width]``."""
        pixels = _pixels(self.image_processor, image)
        return MediaFeatures({"pixel_values": pixels}, self._whole_and(pixels.shape[0] - 1))

    def image_text(self, width: int, height: int) -> str | None:
        """Return the text of an image's features: without crops it is the same for all."""
        return None if self.image_processor.do_pan_and_scan else self._whole_and(0)

    def _whole_and(self, crops: int) -> str:
        whole = f"\n\n{self._start}{self._token * self.config.mm_tokens_per_image}{self._end}\n\n"
        if not crops:
            return whole
        cut = " ".join([whole] * crops)
        return f"Here is the original image {whole} and here are some crops to help you see better {cut}"

    @property
    def unsupervised(self) -> frozenset[int]:
        """Ids of tokens that stand for features, and of those around them."""
        return frozenset(self.id_of(token) for token in (self._start, self._token, self._end))

    def per_token(self, ids: Tensor) -> dict[str, Tensor]:
        """Return ``token_type_ids``: 1 for images."""
        return {"token_type_ids": (ids == self.id_of(self._token)).long()}


def _pixels(processor: Any, image: Image, **options: Any) -> PixelList:
    """Return what a processor makes of an image, but for rescaling and normalizing."""
    made: Any = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="pt", **options)
    return tiles(made["pixel_values"], Normalization.of(processor))
