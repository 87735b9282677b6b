"""Videos to frames in RGB, only those a model sees, resized as they are decoded so that memory stays bounded."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veomni.data.multimodal.limits import MediaLimits
from veomni.data.multimodal.patches import resize_frames
from veomni.data.multimodal.resizing import Size
from veomni.data.multimodal.sounds import Sound, mono
from veomni.errors import MediaError, MissingExtraError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

# Of FFmpeg's formats, those that hold their media themselves: a playlist would make it open other files and addresses.
_FORMATS = "mov,mp4,m4a,3gp,matroska,webm,avi,mpegts,mpeg,mpegvideo,ogg,flv,asf,gif"
_REPLACE = "replace the file, or remove the record"


@dataclass(frozen=True)
class Video:
    """Frames of a video.

    Attributes:
        frames: uint8 ``[frames, 3, height, width]``.
        indices: Which frames of the file they are, ascending; the last may be there twice.
        total: Frames of the file.
        fps: Frames per second of the file.
        sound: What is heard, or None.
    """

    frames: Tensor
    indices: list[int]
    total: int
    fps: float
    sound: Sound | None = None

    @property
    def timestamps(self) -> list[float]:
        """Second at which each frame is shown."""
        return [index / self.fps for index in self.indices]

    @property
    def sampled_fps(self) -> float:
        """Frames per second of the frames that are there."""
        return len(self.indices) / self.total * self.fps


@dataclass(frozen=True)
class VideoReading:
    """What is taken from a video.

    Attributes:
        sample: From number of frames and frames per second to the frames that are seen.
        size: From number of frames seen, height and width to the size of a frame.
        sound_rate: Samples per second of the sound; None leaves it out.
    """

    sample: Callable[[int, float], Sequence[int]]
    size: Callable[[int, int, int], Size]
    sound_rate: int | None = None


def load_video(content: bytes, name: str, reading: VideoReading, limits: MediaLimits | None = None) -> Video:
    """Decode a video, by PyAV.

    Args:
        content: A file's bytes.
        name: Names the video, for messages.
        reading: What is taken from it.
        limits: What is refused.

    Raises:
        MediaError: it is no video, damaged, cut short, or beyond the limits.
        MissingExtraError: PyAV is not installed.
    """
    limits = limits or MediaLimits()
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("av", "video") from error
    try:
        with av.open(io.BytesIO(content), "r", options={"format_whitelist": _FORMATS}) as container:
            total, fps = _checked(container, name, limits)
            indices = [int(index) for index in reading.sample(total, fps)]
            container.seek(0)
            frames = _frames(container, name, indices, reading)
            sound = None
            if reading.sound_rate is not None and container.streams.audio:
                container.seek(0)
                sound = _sound(container, name, reading.sound_rate)
            return Video(frames, indices, total, fps, sound)
    except av.error.FFmpegError as error:
        raise MediaError(f"{name}: no video that can be read ({error.strerror})", _REPLACE) from error


def _checked(container: InputContainer, name: str, limits: MediaLimits) -> tuple[int, float]:
    """Return number of frames and frames per second, of a video that says nothing against the limits."""
    if not container.streams.video:
        raise MediaError(f"{name}: no pictures in it", _REPLACE)
    stream = container.streams.video[0]
    limits.check_picture(name, stream.codec_context.width, stream.codec_context.height)
    if container.duration:
        limits.check_duration(name, container.duration / 1_000_000)
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise MediaError(f"{name}: no frames per second in it", _REPLACE)
    packets = [packet for packet in container.demux(stream) if packet.size > 0]
    if not packets:
        raise MediaError(f"{name}: no frames in it", _REPLACE)
    limits.check_duration(name, len(packets) / float(rate))
    if len(packets) < stream.frames:
        raise MediaError(f"{name}: ends after {len(packets)} of {stream.frames} frames", _REPLACE)
    _refuse_cut(name, packets, _promised_seconds(container))
    return len(packets), float(rate)


def _promised_seconds(container: InputContainer) -> float | None:
    """Return how long the header says that the pictures last, if it does."""
    stream = container.streams.video[0]
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    alone = len(container.streams) == 1  # otherwise the sound may last longer
    return container.duration / 1_000_000 if alone and container.duration else None


def _refuse_cut(name: str, packets: Sequence[Any], promised: float | None) -> None:
    last = max((packet.pts or 0) * (packet.time_base or 0) for packet in packets)
    if promised is not None and promised - last > max(1.0, 0.05 * promised):
        problem = f"{name}: ends at second {float(last):.1f} of {promised:.1f}"
        raise MediaError(problem, _REPLACE)


def _frames(container: InputContainer, name: str, indices: Sequence[int], reading: VideoReading) -> Tensor:
    wanted = set(indices)
    found: dict[int, Tensor] = {}
    for index, frame in enumerate(container.decode(video=0)):
        if frame.is_corrupt:
            raise MediaError(f"{name}: frame {index + 1} is damaged", _REPLACE)
        if index in wanted:
            pixels = torch.from_numpy(_upright(frame)).permute(2, 0, 1)
            found[index] = resize_frames(pixels[None], reading.size(len(indices), *pixels.shape[1:]))[0]
        if len(found) == len(wanted):
            break
    missing = sorted(wanted - found.keys())
    if missing:
        raise MediaError(f"{name}: frame {missing[0] + 1} and what follows cannot be decoded", _REPLACE)
    return torch.stack([found[index] for index in indices])


def _upright(frame: VideoFrame) -> NDArray[np.uint8]:
    """Return RGB ``[height, width, 3]`` as it is to be shown: telephones store how they were held."""
    quarters = round(frame.rotation / 90)  # counterclockwise
    pixels: Any = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


def _sound(container: InputContainer, name: str, rate: int) -> Sound:
    from av.audio.resampler import AudioResampler

    floats = AudioResampler(format="fltp")
    pieces: list[Any] = []
    given_rate = rate
    for frame in container.decode(audio=0):
        given_rate = frame.sample_rate
        pieces += [piece.to_ndarray() for piece in floats.resample(frame)]
    pieces += [piece.to_ndarray() for piece in floats.resample(None)]
    channels = np.concatenate(pieces, axis=1) if pieces else np.empty((1, 0), np.float32)
    return mono(channels, name, given_rate, rate)
