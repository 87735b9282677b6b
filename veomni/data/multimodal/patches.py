"""Frames to the patches that encoders of the Qwen and GLM kind read: transformers' rule, without torchvision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from veomni.data.multimodal.processor_rules import Size

if TYPE_CHECKING:
    from PIL.Image import Image


def resize_frames(frames: Tensor, size: Size) -> Tensor:
    """Resize uint8 ``[frames, 3, height, width]`` bicubically with antialiasing, as torchvision does.

    Pillow's result differs by rounding, and at hard edges by what it cuts off between its two passes.
    """
    if frames.shape[-2:] == size:
        return frames.contiguous()
    return F.interpolate(frames.contiguous(), size, mode="bicubic", antialias=True)


def image_patches(image: Image, *, patch: int, merge: int) -> NDArray[np.uint8]:
    """Cut an RGB image, its sides multiples of ``patch * merge``, into ``[patches, 3, 1, patch * patch]``.

    Patches that become one token are neighbours, as transformers' image processors have them.
    """
    width, height = image.size
    rows, columns = height // patch, width // patch
    cut = np.empty((rows // merge, columns // merge, merge, merge, 3, patch, patch), np.uint8)
    for channel, band in enumerate(image.split()):  # faster than to pick every third byte here
        plane = np.asarray(band).reshape(rows // merge, merge, patch, columns // merge, merge, patch)
        cut[:, :, :, :, channel] = plane.transpose(0, 3, 1, 4, 2, 5)
    return cut.reshape(rows * columns, 3, 1, patch * patch)


def patchify(frames: Tensor, *, patch: int, merge: int, frames_per_patch: int) -> tuple[Tensor, Tensor]:
    """Cut frames ``[frames, channels, height, width]``, sides multiples of ``patch * merge``, into patches.

    The last frame is repeated to fill a patch of ``frames_per_patch``.

    Returns:
        Patches ``[patches, channels, frames_per_patch, patch * patch]``, those that become one token as neighbours, and
        their number in time, height and width, int64 ``[1, 3]``.
    """
    short = -len(frames) % frames_per_patch
    frames = torch.cat([frames, frames[-1:].expand(short, -1, -1, -1)]) if short else frames
    count, channels, height, width = frames.shape
    time, rows, columns = count // frames_per_patch, height // patch, width // patch
    split = (time, frames_per_patch, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    patches = frames.reshape(split).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    shape = (time * rows * columns, channels, frames_per_patch, patch * patch)
    return patches.reshape(shape), torch.tensor([[time, rows, columns]])
