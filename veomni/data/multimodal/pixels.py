"""8-bit pixels on their way to the model: resized, cut into patches, and normalized last.

So an eighth of what they become is kept, cached and sent between processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from veomni.data.multimodal.processor_rules import Size

_CHUNK = 1 << 18  # values that are normalized at once: they stay in the processor's cache


@dataclass(frozen=True)
class Normalization:
    """What each value becomes: ``(value * scale - mean) / std`` of its channel, the product in 64 bits, the rest in 32.

    That is what transformers' image processors for Pillow compute, to the bit.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any) -> Normalization:
        """Return the normalization of one of transformers' image processors."""
        scale = float(processor.rescale_factor) if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        return cls(scale, *(tuple(np.broadcast_to(values, 3).tolist()) for values in (mean, std)))

    @classmethod
    def of_frames(cls, mean: Sequence[float], std: Sequence[float]) -> Normalization:
        """Return that of video frames, whose mean and deviation transformers scales instead of the values."""
        return cls(1.0, *(tuple(torch.tensor(values).mul(255.0).tolist()) for values in (mean, std)))

    def __call__(self, values: Tensor) -> Tensor:
        """Return float32 of uint8 ``[items, channels, frames, values]``."""
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (self.mean, self.std))
        return values.to(torch.float64).mul_(self.scale).to(torch.float32).sub_(mean).div_(std)


@dataclass(frozen=True)
class Pixels:
    """Images or frames that are still to be normalized into a float32 tensor of a shape that begins with ``items``.

    ``values`` are uint8 ``[items, channels, frames, values]``; an item is a patch, a tile or an image. One frame stands
    for as many as ``shape`` has: a still image fills a patch of several frames.
    """

    values: NDArray[np.uint8]
    shape: tuple[int, ...]
    normalization: Normalization

    def write(self, out: Tensor) -> None:
        """Normalize into a contiguous float32 tensor of :attr:`shape`."""
        items, channels, _, numbers = self.values.shape
        view = out.view(items, channels, -1, numbers)
        step = max(1, _CHUNK // (channels * numbers))
        values = torch.from_numpy(self.values)
        for start in range(0, items, step):
            view[start : start + step] = self.normalization(values[start : start + step])


class PixelList(list[Pixels]):
    """The pixels of several images or videos, one after another."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that they become."""
        return (sum(pixels.shape[0] for pixels in self), *self[0].shape[1:])

    def normalized(self) -> Tensor:
        """Return the float32 tensor that a model takes."""
        made = torch.from_numpy(np.empty(self.shape, np.float32))  # in huge pages, which torch.empty does not ask for
        for pixels, part in zip(self, made.split([pixels.shape[0] for pixels in self]), strict=True):
            pixels.write(part)
        return made


def tiles(values: Tensor, normalization: Normalization) -> PixelList:
    """Return images, uint8 ``[items, channels, height, width]``, still to be normalized."""
    return PixelList([Pixels(values.flatten(2)[:, :, None].numpy(), tuple(values.shape), normalization)])


def as_tensor(value: Tensor | PixelList) -> Tensor:
    """Return what a model takes."""
    return value.normalized() if isinstance(value, PixelList) else value


def resize_frames(frames: Tensor, size: Size) -> Tensor:
    """Resize uint8 ``[frames, 3, height, width]`` bicubically with antialiasing, as torchvision does.

    Pillow's result differs by rounding, and at hard edges by what it cuts off between its two passes.
    """
    if frames.shape[-2:] == size:
        return frames.contiguous()
    return F.interpolate(frames.contiguous(), size, mode="bicubic", antialias=True)


def patchify(frames: Tensor, *, patch: int, merge: int, frames_per_patch: int) -> tuple[Tensor, Tensor]:
    """Cut frames ``[frames, channels, height, width]``, sides multiples of ``patch * merge``, as transformers does.

    The last frame is repeated to fill a patch. Returns ``[patches, channels, frames_per_patch, patch * patch]``, those
    that become one token as neighbours, and the patches in time, height and width, int64 ``[1, 3]``.
    """
    short = -len(frames) % frames_per_patch
    frames = torch.cat([frames, frames[-1:].expand(short, -1, -1, -1)]) if short else frames
    count, channels, height, width = frames.shape
    time, rows, columns = count // frames_per_patch, height // patch, width // patch
    split = (time, frames_per_patch, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    patches = frames.reshape(split).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    shape = (time * rows * columns, channels, frames_per_patch, patch * patch)
    return patches.reshape(shape), torch.tensor([[time, rows, columns]])
