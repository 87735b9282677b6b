"""To which size images are resized: the rules of the Qwen2-VL, Qwen3-VL and GLM-4V processors of transformers."""

from __future__ import annotations

import math

_MAX_RATIO = 200

Size = tuple[int, int]  # height, width


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """Return the size nearest to ``height`` x ``width`` with sides that are multiples of ``factor``.

    The area is brought within ``min_pixels`` and ``max_pixels``, keeping the aspect ratio as well as multiples allow.
    Halves round to even, as Python's ``round`` does; every detail is that of transformers' Qwen2-VL image processor.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    return smart_resize_frames(
        1, height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels, temporal_factor=1, enlarge=False
    )


def smart_resize_frames(
    frames: int, height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int, temporal_factor: int,
    enlarge: bool = True,
) -> Size:  # fmt: skip
    """Return a frame's size where the bounds are for the pixels of all frames together (Qwen3-VL, GLM-4V).

    Args:
        frames: Number of frames; an image counts as ``temporal_factor`` frames there.
        height: Of a frame.
        width: Of a frame.
        factor: Both sides become multiples of it.
        min_pixels: Least pixels of all frames.
        max_pixels: Most pixels of all frames.
        temporal_factor: Frames that share a patch: their number is rounded to its multiples.
        enlarge: Bring both sides to ``factor`` first, where one is shorter.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if enlarge and min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > _MAX_RATIO:
        raise ValueError(f"{width} x {height}: one side is more than {_MAX_RATIO} times the other")
    rounded = round(height / factor) * factor, round(width / factor) * factor
    volume = round(frames / temporal_factor) * temporal_factor * rounded[0] * rounded[1]
    if volume > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        return _below(height / shrink, factor), _below(width / shrink, factor)
    if volume < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rounded


def _below(side: float, factor: int) -> int:
    return max(factor, math.floor(side / factor) * factor)
