"""Frames to the patches that vision towers of the Qwen and GLM kind read: transformers' rule, without torchvision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from veomni.data.multimodal.resizing import Size


def resize_frames(frames: Tensor, size: Size) -> Tensor:
    """Resize uint8 ``[frames, 3, height, width]`` bicubically with antialiasing, as torchvision does.

    Pillow's result differs by rounding, and at hard edges by what it cuts off between its two passes.
    """
    if frames.shape[-2:] == size:
        return frames.contiguous()
    return F.interpolate(frames.contiguous(), size, mode="bicubic", antialias=True)


def normalize_frames(frames: Tensor, mean: Sequence[float], std: Sequence[float], scale: float = 1 / 255) -> Tensor:
    """Return ``(frames * scale - mean) / std`` as float32, in one step as transformers' torchvision backend does."""
    offset, spread = (torch.tensor(values).mul(1 / scale).view(-1, 1, 1) for values in (mean, std))
    return frames.to(torch.float32).sub(offset).div(spread)


def patchify(frames: Tensor, *, patch: int, merge: int, frames_per_patch: int) -> tuple[Tensor, Tensor]:
    """Cut frames into patches.

    Args:
        frames: float32 ``[frames, channels, height, width]``, sides multiples of ``patch * merge``.
        patch: Side of a patch.
        merge: Patches along one side that become one token: they are neighbours in the result.
        frames_per_patch: Frames that share a patch; the last frame is repeated to fill it.

    Returns:
        Patches ``[patches, channels * frames_per_patch * patch * patch]``, and their number in time, height and width,
        int64 ``[1, 3]``.
    """
    short = -len(frames) % frames_per_patch
    frames = torch.cat([frames, frames[-1:].expand(short, -1, -1, -1)]) if short else frames
    count, channels, height, width = frames.shape
    time, rows, columns = count // frames_per_patch, height // patch, width // patch
    cut = frames.reshape(
        time, frames_per_patch, channels, rows // merge, merge, patch, columns // merge, merge, patch
    )  # fmt: skip
    flat = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(time * rows * columns, -1)
    return flat, torch.tensor([[time, rows, columns]])
