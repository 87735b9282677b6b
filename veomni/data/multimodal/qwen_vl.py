"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and GLM-4V: patches of images and of pairs of frames."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from veomni.data.multimodal import processor_rules as rules
from veomni.data.multimodal.family import Family, MediaFeatures
from veomni.data.multimodal.pixels import Normalization, PixelList, Pixels, patchify
from veomni.data.multimodal.processor_rules import Size
from veomni.data.multimodal.videos import Video
from veomni.errors import ModelError

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


class Qwen2VL(Family):
    """Qwen2-VL."""

    default_processor = "Qwen2VLImageProcessor"
    video_defaults: ClassVar[Mapping[str, Any]] = {
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}, "patch_size": 14, "merge_size": 2,
        "temporal_patch_size": 2, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "fps": 2, "min_frames": 4,
        "max_frames": 768, "max_video_tokens": 128_000,
    }  # fmt: skip

    def __post_init__(self) -> None:
        given = type(self.image_processor).__name__
        if given != f"{self.default_processor}Pil":
            problem = f"{self.config.model_type} models have a {self.default_processor}, not {given}"
            raise ModelError(problem, "put the model's own preprocessor_config.json beside it")
        self.placeholders = {kind: self.token(f"{kind}_token_id") for kind in ("image", "video")}
        self.patches_per_token = int(self.image_processor.merge_size) ** 2

    def image(self, image: Image) -> MediaFeatures:
        """Return ``pixel_values`` ``[patches, values]`` and ``image_grid_thw`` ``[1, 3]``.

        The processor's steps with its settings, but the pixels stay 8-bit until they are normalized in a batch.
        """
        processor = self.image_processor
        height, width = self._image_size(image.height, image.width)
        if image.size != (width, height):
            image = image.resize((width, height), processor.resample)
        planes = np.stack([np.asarray(band) for band in image.split()])  # faster than to pick every third byte
        patch, merge = processor.patch_size, processor.merge_size
        patches, grid = patchify(torch.from_numpy(planes)[None], patch=patch, merge=merge, frames_per_patch=1)
        shape = (len(patches), 3 * processor.temporal_patch_size * patch * patch)
        pixels = PixelList([Pixels(patches.numpy(), shape, Normalization.of(processor))])
        return MediaFeatures({"pixel_values": pixels, "image_grid_thw": grid}, self._image_tokens(len(patches)))

    def image_text(self, width: int, height: int) -> str:
        """Return a token for each square of patches."""
        rows, columns = self._image_size(height, width)
        return self._image_tokens(rows * columns // self.image_processor.patch_size**2)

    def _image_tokens(self, patches: int) -> str:
        return self.placeholders["image"] * (patches // self.patches_per_token)

    def _image_size(self, height: int, width: int) -> Size:
        processor = self.image_processor
        return self._resized(height, width, **_bounds(vars(processor))) if processor.do_resize else (height, width)

    def _resized(self, height: int, width: int, **bounds: Any) -> Size:
        """Return the size of an image; raises ValueError for one more than 200 times as long as wide."""
        return rules.smart_resize(height, width, **bounds)

    def sample_frames(self, frames: int, fps: float) -> list[int]:
        """Return frames at ``fps`` per second, within ``min_frames`` and ``max_frames``."""
        return rules.evenly_by_rate(frames, fps, **self._rates(), multiple=self.video_settings["temporal_patch_size"])

    def _rates(self) -> dict[str, Any]:
        video = self.video_settings
        return {"wanted_fps": video["fps"], "min_frames": video["min_frames"], "max_frames": video["max_frames"]}

    def frame_size(self, frames: int, height: int, width: int) -> Size:
        """Return the size within the pixel bounds of a frame; with ``cap_pixels_per_frame``, also of the video."""
        video, bounds = self.video_settings, _bounds(self.video_settings)
        if video.get("cap_pixels_per_frame"):
            budget = int(video["max_video_tokens"] * bounds["factor"] ** 2 * 0.9)
            share = min(bounds["max_pixels"], budget * video["temporal_patch_size"] // frames)
            bounds["max_pixels"] = max(share, int(bounds["min_pixels"] * 1.05))
        return rules.smart_resize(height, width, **bounds)

    def video(self, video: Video) -> MediaFeatures:
        """Return ``pixel_values_videos`` ``[patches, values]``, ``video_grid_thw`` ``[1, 3]`` and what times need."""
        settings = self.video_settings
        patch, merge, together = (settings[key] for key in ("patch_size", "merge_size", "temporal_patch_size"))
        patches, grid = patchify(video.frames, patch=patch, merge=merge, frames_per_patch=together)
        normalization = Normalization.of_frames(settings["image_mean"], settings["image_std"])
        pixels = Pixels(patches.numpy(), (len(patches), patches[0].numel()), normalization)
        tensors: dict[str, Tensor | PixelList] = {"pixel_values_videos": PixelList([pixels]), "video_grid_thw": grid}
        return MediaFeatures(tensors | self.video_times(video), self.video_text(video, grid))

    def video_times(self, video: Video) -> dict[str, Tensor]:
        """Return inputs that say how long a patch lasts."""
        return {}

    def video_text(self, video: Video, grid: Tensor) -> str:
        """Return what takes the placeholder's place."""
        return self.placeholders["video"] * self.tokens(grid)

    def tokens(self, grid: Tensor) -> int:
        """Return the number of tokens of a video's patches."""
        return int(grid.prod()) // int(self.video_settings["merge_size"]) ** 2

    def per_token(self, ids: Tensor) -> dict[str, Tensor]:
        """Return ``mm_token_type_ids``: 1 for images, 2 for videos."""
        image, video = (self.id_of(self.placeholders[kind]) for kind in ("image", "video"))
        return {"mm_token_type_ids": (ids == image).long() + 2 * (ids == video).long()}


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL: positions follow the seconds of a video."""

    def video_times(self, video: Video) -> dict[str, Tensor]:
        """Return ``second_per_grid_ts`` ``[1]``: the seconds of a patch."""
        return {"second_per_grid_ts": torch.tensor([self.video_settings["temporal_patch_size"] / video.sampled_fps])}


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: each pair of frames follows the second it is shown at, as text; pixel bounds are of the whole video."""

    video_defaults: ClassVar[Mapping[str, Any]] = {
        **Qwen2VL.video_defaults, "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
        "patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "max_video_tokens": 768,
    }  # fmt: skip

    def sample_frames(self, frames: int, fps: float) -> list[int]:
        """Return frames at ``fps`` per second from the first to the last, within ``min_frames`` and ``max_frames``."""
        return rules.between_ends(frames, fps, **self._rates())

    def frame_size(self, frames: int, height: int, width: int) -> Size:
        """Return the size of a frame that keeps the video within its pixel bounds."""
        video, bounds = self.video_settings, _bounds(self.video_settings)
        together = video["temporal_patch_size"]
        if video.get("cap_pixels_per_frame"):
            share = min(video["max_video_tokens"] * bounds["factor"] ** 2, bounds["max_pixels"] // frames)
            bounds["max_pixels"] = max(share, int(bounds["min_pixels"] * 1.05)) * frames
        bounds |= {"frames": max(frames, together), "temporal_factor": together, "enlarge": True}
        return rules.smart_resize(height, width, **bounds)

    def video_text(self, video: Video, grid: Tensor) -> str:
        """Return, for each pair of frames, the mean of their seconds and their placeholders between start and end."""
        together = int(self.video_settings["temporal_patch_size"])
        start, end = self.token("vision_start_token_id"), self.token("vision_end_token_id")
        times = video.timestamps + video.timestamps[-1:] * (-len(video.indices) % together)
        shown = start + self.placeholders["video"] * (self.tokens(grid) // int(grid[0, 0])) + end
        middles = [(times[at] + times[at + together - 1]) / 2 for at in range(0, len(times), together)]
        return "".join(f"<{middle:.1f} seconds>{shown}" for middle in middles)


class Glm4V(Qwen2VL):
    """GLM-4.1V and GLM-4.5V: one placeholder for images and frames; frames precede the second they are shown at."""

    default_processor = "Glm4vImageProcessor"
    video_defaults: ClassVar[Mapping[str, Any]] = {
        "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 30_000}, "patch_size": 14, "merge_size": 2,
        "temporal_patch_size": 2, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "fps": 2, "max_duration": 300,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self._ends = [self.token(f"image_{end}_token_id") for end in ("start", "end")]

    def _resized(self, height: int, width: int, **bounds: Any) -> Size:
        """Return the size of an image, which counts as a patch of frames."""
        frames = self.image_processor.temporal_patch_size
        return rules.smart_resize(height, width, **bounds, frames=frames, temporal_factor=frames, enlarge=True)

    def sample_frames(self, frames: int, fps: float) -> list[int]:
        """Return the frames at ``fps`` per second; of a video longer than ``max_duration``, as many as of that."""
        video = self.video_settings
        return rules.at_seconds(frames, fps, wanted_fps=video["fps"], max_seconds=video["max_duration"])

    def frame_size(self, frames: int, height: int, width: int) -> Size:
        """Return the size of a frame that keeps the video within its pixel bounds."""
        video = self.video_settings
        bounds = _bounds(video) | {"frames": frames, "temporal_factor": video["temporal_patch_size"], "enlarge": True}
        return rules.smart_resize(height, width, **bounds)

    def video_text(self, video: Video, grid: Tensor) -> str:
        """Return, for each pair of frames, its image placeholders between start and end, and the whole second."""
        pairs, (start, end) = int(grid[0, 0]), self._ends
        shown = start + self.placeholders["image"] * (self.tokens(grid) // pairs) + end
        seconds = video.timestamps[::2]
        seconds += seconds[-1:] * (pairs - len(seconds))
        return "".join(f"{shown}{int(second)}" for second in seconds[:pairs])

    def per_token(self, ids: Tensor) -> dict[str, Tensor]:
        """Return ``mm_token_type_ids``: 1 for images, and 2 for the same placeholder within a video."""
        start, end = self.config.video_start_token_id, self.config.video_end_token_id
        within = (ids == start).cumsum(0) > (ids == end).cumsum(0)
        image = ids == self.id_of(self.placeholders["image"])
        return {"mm_token_type_ids": torch.where(image, 1 + within.long(), 0)}


def _bounds(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what sizes are bounded by, from the settings of a processor."""
    size = settings["size"]
    least, most = size["shortest_edge"], size["longest_edge"]
    return {"factor": settings["patch_size"] * settings["merge_size"], "min_pixels": least, "max_pixels": most}
