"""Which frames of a video are seen, and sizes: the rules of transformers' Qwen-VL, GLM-4V and InternVL processors."""

import math

import numpy as np
import torch

_MAX_RATIO = 200

Size = tuple[int, int]  # height, width


def evenly_by_rate(
    total: int, fps: float, *, wanted_fps: float, min_frames: int, max_frames: int, multiple: int
) -> list[int]:
    """Return frames at equal distances from the first on, their number a multiple (Qwen2-VL, Qwen2.5, Qwen-Omni).

    Of a video shorter than ``multiple`` frames, all are returned.
    """
    most = math.floor(min(max_frames, total) / multiple) * multiple
    count = min(max(total / fps * wanted_fps, min_frames), most, total)
    count = math.floor(count / multiple) * multiple
    if count == 0:
        return list(range(total))
    return torch.arange(0, total, total / count).int().tolist()


def between_ends(total: int, fps: float, *, wanted_fps: float, min_frames: int, max_frames: int) -> list[int]:
    """Return frames at equal distances, the first and the last among them (Qwen3-VL)."""
    count = min(max(int(total / fps * wanted_fps), min_frames), max_frames, total)
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def at_seconds(total: int, fps: float, *, wanted_fps: float, max_seconds: float) -> list[int]:
    """Return the frames shown at equal distances in time; an even number, the last one twice if need be (GLM-4V)."""
    last, duration = total - 1, total / fps
    if duration <= max_seconds:
        places = [place * fps / wanted_fps for place in range(max(math.floor(duration * wanted_fps), 1))]
    elif (count := int(max_seconds * wanted_fps)) < total:
        places = (np.linspace(0, duration, count) * fps).tolist()
    else:
        places = [float(place) for place in range(total)]
    indices = list(dict.fromkeys(min(last, math.ceil(place)) for place in places))
    return [*indices, indices[-1]] if len(indices) % 2 else indices


def from_middles(total: int, *, count: int) -> list[int]:
    """Return the middles of ``count`` equal parts (InternVL); of a shorter video, all frames."""
    if count >= total:
        return list(range(total))
    return torch.arange(total / count / 2, total, total / count).int().tolist()


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int, frames: int = 1,
    temporal_factor: int = 1, enlarge: bool = False,
) -> Size:  # fmt: skip
    """Return the size nearest to ``height`` x ``width`` with sides that are multiples of ``factor``.

    The pixels of all frames together are brought within ``min_pixels`` and ``max_pixels``, keeping the aspect ratio as
    well as multiples allow (ValueError: above 200). Every detail is that of transformers' Qwen2-VL, Qwen3-VL and GLM-4V
    processors. The last two bound all ``frames`` of a video together, their number rounded to multiples of the
    ``temporal_factor`` that share a patch; with ``enlarge`` both sides are brought to ``factor`` first.
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
