"""GLM-4V: one placeholder for images and frames; frames follow the second they are shown at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from veomni.data.multimodal.family import FamilyParts
from veomni.data.multimodal.qwen_vl import CLIP_MEAN, CLIP_STD, Qwen2VL
from veomni.data.multimodal.resizing import Size, smart_resize_frames
from veomni.data.multimodal.sampling import at_seconds
from veomni.data.multimodal.videos import Video


class Glm4V(Qwen2VL):
    """GLM-4.1V and GLM-4.5V."""

    image_processor = "Glm4vImageProcessor"
    video_defaults: ClassVar[Mapping[str, Any]] = {
        "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 30_000}, "patch_size": 14, "merge_size": 2,
        "temporal_patch_size": 2, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "fps": 2, "max_duration": 300,
    }  # fmt: skip

    def __init__(self, parts: FamilyParts) -> None:
        super().__init__(parts)
        self._ends = [self.token(f"image_{end}_token_id") for end in ("start", "end")]

    def image_size(self, height: int, width: int) -> Size:
        """Return the size to which an image is resized: it counts as a patch of frames."""
        processor, size = self.parts.image_processor, self.parts.image_processor.size
        frames = processor.temporal_patch_size
        if not processor.do_resize:
            return height, width
        return smart_resize_frames(
            frames, height, width, factor=processor.patch_size * processor.merge_size, min_pixels=size.shortest_edge,
            max_pixels=size.longest_edge, temporal_factor=frames,
        )  # fmt: skip

    def sample_frames(self, frames: int, fps: float) -> list[int]:
        """Return the frames at ``fps`` per second; of a video longer than ``max_duration``, as many as of that."""
        video = self.parts.video
        return at_seconds(frames, fps, wanted_fps=video["fps"], max_seconds=video["max_duration"])

    def frame_size(self, frames: int, height: int, width: int) -> Size:
        """Return the size of a frame that keeps the video within its pixel bounds."""
        video = self.parts.video
        return smart_resize_frames(
            frames, height, width, factor=video["patch_size"] * video["merge_size"],
            min_pixels=video["size"]["shortest_edge"], max_pixels=video["size"]["longest_edge"],
            temporal_factor=video["temporal_patch_size"],
        )  # fmt: skip

    def video_text(self, video: Video, grid: Tensor) -> str:
        """Return, for each pair of frames, its image placeholders between start and end, and the whole second."""
        start, end = self._ends
        shown = start + self.placeholders["image"] * (self.tokens(grid) // int(grid[0, 0])) + end
        seconds = video.timestamps[::2]
        seconds += seconds[-1:] * (int(grid[0, 0]) - len(seconds))
        return "".join(f"{shown}{int(second)}" for second in seconds[: int(grid[0, 0])])

    def per_token(self, ids: Tensor) -> dict[str, Tensor]:
        """Return ``mm_token_type_ids``: 1 for images, and 2 for the same placeholder within a video."""
        start, end = (self.parts.config.video_start_token_id, self.parts.config.video_end_token_id)
        within = (ids == start).cumsum(0) > (ids == end).cumsum(0)
        image = ids == self.id_of(self.placeholders["image"])
        return {"mm_token_type_ids": torch.where(image, 1 + within.long(), 0)}
