"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches of images and of pairs of frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from veomni.data.multimodal.family import Family, FamilyParts, MediaFeatures
from veomni.data.multimodal.patches import image_patches, patchify
from veomni.data.multimodal.pixels import Normalization, PixelList, Pixels
from veomni.data.multimodal.resizing import Size, smart_resize, smart_resize_frames
from veomni.data.multimodal.sampling import between_ends, evenly_by_rate
from veomni.errors import ModelError

if TYPE_CHECKING:
    from PIL.Image import Image

    from veomni.data.multimodal.videos import Video

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


class Qwen2VL(Family):
    """Qwen2-VL."""

    image_processor = "Qwen2VLImageProcessor"
    video_defaults: ClassVar[Mapping[str, Any]] = {
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}, "patch_size": 14, "merge_size": 2,
        "temporal_patch_size": 2, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "fps": 2, "min_frames": 4,
        "max_frames": 768, "max_video_tokens": 128_000,
    }  # fmt: skip

    def __init__(self, parts: FamilyParts) -> None:
        super().__init__(parts)
        given = type(parts.image_processor).__name__
        if given != f"{self.image_processor}Pil":
            problem = f"{parts.config.model_type} models have a {self.image_processor}, not {given}"
            raise ModelError(problem, "put the model's own preprocessor_config.json beside it")
        self.placeholders = {"image": self.token("image_token_id"), "video": self.token("video_token_id")}
        self.patches_per_token = int(parts.image_processor.merge_size) ** 2

    def image(self, image: Image) -> MediaFeatures:
        """Return ``pixel_values`` ``[patches, values]`` and ``image_grid_thw`` ``[1, 3]``.

        The processor's steps with its settings, but the pixels stay 8-bit until they are normalized in a batch.
        """
        processor = self.parts.image_processor
        patch, merge, frames = processor.patch_size, processor.merge_size, processor.temporal_patch_size
        height, width = self.image_size(image.height, image.width)
        if image.size != (width, height):
            image = image.resize((width, height), processor.resample)
        cut = image_patches(image, patch=patch, merge=merge)
        shape = (len(cut), 3 * frames * patch * patch)
        pixels = PixelList([Pixels(cut, shape, Normalization.of(processor))])
        grid = torch.tensor([[1, height // patch, width // patch]])
        return MediaFeatures({"pixel_values": pixels, "image_grid_thw": grid}, self._image_tokens(len(cut)))

    def image_size(self, height: int, width: int) -> Size:
        """Return the size to which an image is resized.

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        processor, size = self.parts.image_processor, self.parts.image_processor.size
        if not processor.do_resize:
            return height, width
        return smart_resize(
            height, width, factor=processor.patch_size * processor.merge_size, min_pixels=size.shortest_edge,
            max_pixels=size.longest_edge,
        )  # fmt: skip

    def image_text(self, width: int, height: int) -> str:
        """Return what takes the placeholder's place."""
        rows, columns = self.image_size(height, width)
        return self._image_tokens(rows * columns // self.parts.image_processor.patch_size**2)

    def _image_tokens(self, patches: int) -> str:
        return self.placeholders["image"] * (patches // self.patches_per_token)

    def sample_frames(self, frames: int, fps: float) -> list[int]:
        """Return frames at ``fps`` per second, within ``min_frames`` and ``max_frames``."""
        video = self.parts.video
        return evenly_by_rate(
            frames, fps, wanted_fps=video["fps"], min_frames=video["min_frames"], max_frames=video["max_frames"],
            multiple=video["temporal_patch_size"],
        )  # fmt: skip

    def frame_size(self, frames: int, height: int, width: int) -> Size:
        """Return the size within the pixel bounds of a frame; with ``cap_pixels_per_frame``, also of the video."""
        video = self.parts.video
        factor = video["patch_size"] * video["merge_size"]
        least, most = video["size"]["shortest_edge"], video["size"]["longest_edge"]
        if video.get("cap_pixels_per_frame"):
            budget = int(video["max_video_tokens"] * factor * factor * 0.9)
            most = max(min(most, budget * video["temporal_patch_size"] // frames), int(least * 1.05))
        return smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)

    def video(self, video: Video) -> MediaFeatures:
        """Return ``pixel_values_videos`` ``[patches, values]``, ``video_grid_thw`` ``[1, 3]`` and what times need."""
        settings = self.parts.video
        patches, grid = patchify(
            video.frames, patch=settings["patch_size"], merge=settings["merge_size"],
            frames_per_patch=settings["temporal_patch_size"],
        )  # fmt: skip
        normalization = Normalization.of_frames(settings["image_mean"], settings["image_std"])
        pixels = PixelList([Pixels(patches.numpy(), (len(patches), patches[0].numel()), normalization)])
        tensors: dict[str, Tensor | PixelList] = {"pixel_values_videos": pixels, "video_grid_thw": grid}
        tensors |= self.video_times(video)
        return MediaFeatures(tensors, self.video_text(video, grid))

    def video_times(self, video: Video) -> dict[str, Tensor]:
        """Return inputs that say how long a patch lasts."""
        return {}

    def video_text(self, video: Video, grid: Tensor) -> str:
        """Return what takes the placeholder's place."""
        return self.placeholders["video"] * self.tokens(grid)

    def tokens(self, grid: Tensor) -> int:
        """Return the number of tokens of a video's patches."""
        return int(grid.prod()) // int(self.parts.video["merge_size"]) ** 2

    def per_token(self, ids: Tensor) -> dict[str, Tensor]:
        """Return ``mm_token_type_ids``: 1 for images, 2 for videos."""
        image, video = (self.id_of(self.placeholders[kind]) for kind in ("image", "video"))
        return {"mm_token_type_ids": (ids == image).long() + 2 * (ids == video).long()}


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL: positions follow the seconds of a video."""

    def video_times(self, video: Video) -> dict[str, Tensor]:
        """Return ``second_per_grid_ts`` ``[1]``: the seconds of a patch."""
        return {"second_per_grid_ts": torch.tensor([self.parts.video["temporal_patch_size"] / video.sampled_fps])}


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: each pair of frames follows the second it is shown at, as text; pixel bounds are of the whole video."""

    video_defaults: ClassVar[Mapping[str, Any]] = {
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768}, "patch_size": 16, "merge_size": 2,
        "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "fps": 2, "min_frames": 4,
        "max_frames": 768, "max_video_tokens": 768,
    }  # fmt: skip

    def sample_frames(self, frames: int, fps: float) -> list[int]:
        """Return frames at ``fps`` per second from the first to the last, within ``min_frames`` and ``max_frames``."""
        video = self.parts.video
        return between_ends(
            frames, fps, wanted_fps=video["fps"], min_frames=video["min_frames"], max_frames=video["max_frames"]
        )

    def frame_size(self, frames: int, height: int, width: int) -> Size:
        """Return the size of a frame that keeps the video within its pixel bounds."""
        video = self.parts.video
        factor, together = video["patch_size"] * video["merge_size"], video["temporal_patch_size"]
        least, most = video["size"]["shortest_edge"], video["size"]["longest_edge"]
        if video.get("cap_pixels_per_frame"):
            share = min(video["max_video_tokens"] * factor * factor, most // frames)
            most = max(share, int(least * 1.05)) * frames
        return smart_resize_frames(
            max(frames, together), height, width, factor=factor, min_pixels=least, max_pixels=most,
            temporal_factor=together,
        )  # fmt: skip

    def video_text(self, video: Video, grid: Tensor) -> str:
        """Return, for each pair of frames, the mean of their seconds and their placeholders between start and end."""
        together = int(self.parts.video["temporal_patch_size"])
        start, end = self.token("vision_start_token_id"), self.token("vision_end_token_id")
        times = video.timestamps + video.timestamps[-1:] * (-len(video.indices) % together)
        shown = start + self.placeholders["video"] * (self.tokens(grid) // int(grid[0, 0])) + end
        middles = [(times[at] + times[at + together - 1]) / 2 for at in range(0, len(times), together)]
        return "".join(f"<{middle:.1f} seconds>{shown}" for middle in middles)
