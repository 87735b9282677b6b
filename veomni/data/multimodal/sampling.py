"""Which frames of a video are seen: the rules of the Qwen2-VL, Qwen3-VL, GLM-4V and InternVL video processors."""

from __future__ import annotations

import math

import numpy as np
import torch


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
    places: list[float]
    if duration <= max_seconds:
        places = [place * fps / wanted_fps for place in range(max(math.floor(duration * wanted_fps), 1))]
    else:
        count = int(max_seconds * wanted_fps)
        places = list(range(total)) if count >= total else (np.linspace(0, duration, count) * fps).tolist()
    indices = list(dict.fromkeys(min(last, math.ceil(place)) for place in places))
    return [*indices, indices[-1]] if len(indices) % 2 else indices


def from_middles(total: int, *, count: int) -> list[int]:
    """Return the middles of ``count`` equal parts (InternVL); of a shorter video, all frames."""
    if count >= total:
        return list(range(total))
    return torch.arange(total / count / 2, total, total / count).int().tolist()
