"""The decoders of video frames: PyAV, or torchcodec where a run chooses it and it supports the file.

PyAV opens and checks every file in any case. With 8 bits per colour both return the same values, which the tests
compare; torchcodec seeks to the wanted frames, but only PyAV reports damage that a codec has concealed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veomni.data.multimodal.limits import unusable
from veomni.errors import ConfigError
from veomni.logging import create_logger

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

logger = create_logger(__name__)

VideoDecoder = Literal["pyav", "torchcodec"]
Frames = Iterator[tuple[int, Tensor]]
"""Places of frames in their file, ascending, and their RGB, uint8 ``[3, height, width]``, turned as the header says."""


class TorchcodecCannotError(Exception):
    """A file that torchcodec cannot decode as PyAV does; the message says why."""


def usable_decoder(wanted: VideoDecoder) -> VideoDecoder:
    """Return the decoder to use here: torchcodec (ConfigError: not installed) only if its libraries can be loaded."""
    if wanted == "pyav":
        return wanted
    if find_spec("torchcodec") is None:
        fix = "pip install torchcodec, and FFmpeg's libraries; or use pyav"
        raise ConfigError("video_decoder is torchcodec, which is not installed", fix, "MediaSettings.video_decoder")
    try:
        import torchcodec
        import torchcodec.decoders
    except (ImportError, OSError, RuntimeError) as error:  # no FFmpeg that it supports, or made for another torch
        logger.warning_once(
            "torchcodec is installed, but its libraries cannot be loaded (%s): videos are decoded by PyAV. It needs "
            "FFmpeg's shared libraries and has to be made for this torch", str(error).strip().partition("\n")[0],
        )  # fmt: skip
        return "pyav"
    versions = torchcodec.__version__, torchcodec.ffmpeg_major_version
    logger.info_rank0("videos are decoded by torchcodec %s with FFmpeg %s", *versions)
    return wanted


def pyav_frames(container: InputContainer, name: str, wanted: Collection[int]) -> Frames:
    """Decode a container from its beginning to the last wanted frame; MediaError if a frame up to there is damaged."""
    last = max(wanted)
    for index, frame in enumerate(container.decode(video=0)):
        if frame.is_corrupt:
            raise unusable(f"{name}: frame {index + 1} is damaged")
        if index in wanted:
            yield index, torch.from_numpy(_upright(frame)).permute(2, 0, 1)
        if index == last:
            break


def _upright(frame: VideoFrame) -> NDArray[np.uint8]:
    """Return RGB ``[height, width, 3]`` as it is to be shown: telephones store how they were held."""
    quarters = round(frame.rotation / 90)  # counterclockwise
    pixels: Any = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


def torchcodec_frames(content: bytes, stream: VideoStream, total: int, wanted: Collection[int]) -> Frames:
    """Decode the wanted frames of a file that PyAV has opened, as ``stream``, and checked.

    TorchcodecCannotError for more than 8 bits a colour, frames that are not shown (PyAV counts ``total``), or damage.
    """
    from torchcodec.decoders import VideoDecoder

    colours = stream.codec_context.format
    bits = max((component.bits for component in colours.components), default=8) if colours else 8
    if bits > 8:
        raise TorchcodecCannotError(f"{bits} bits a colour, whose conversion differs")
    try:
        decoder = VideoDecoder(content, stream_index=stream.index, device="cpu")
        if decoder.metadata.num_frames != total:
            raise TorchcodecCannotError("frames that are not shown")
        for index in sorted(wanted):
            yield index, decoder.get_frame_at(index).data
    except (RuntimeError, ValueError, IndexError) as error:
        raise TorchcodecCannotError(str(error).strip().partition("\n")[0]) from error
