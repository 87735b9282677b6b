"""Videos to frames in RGB, only those a model sees, resized as they are decoded so that memory stays bounded."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veomni.data.multimodal.audio_clip import AudioClip, mono
from veomni.data.multimodal.frames import (
    Frames,
    TorchcodecCannotError,
    VideoDecoder,
    pyav_frames,
    torchcodec_frames,
)
from veomni.data.multimodal.limits import MediaLimits
from veomni.data.multimodal.patches import resize_frames
from veomni.data.multimodal.resizing import Size
from veomni.errors import MediaError, MissingExtraError
from veomni.logging import create_logger

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.stream import Stream

logger = create_logger(__name__)

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
        audio: The audio track, or None.
    """

    frames: Tensor
    indices: list[int]
    total: int
    fps: float
    audio: AudioClip | None = None

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
        audio_rate: Samples per second of the audio clip; None leaves it out.
        decoder: Decoder of the frames; see :func:`~veomni.data.multimodal.frames.usable_decoder`.
    """

    sample: Callable[[int, float], Sequence[int]]
    size: Callable[[int, int, int], Size]
    audio_rate: int | None = None
    decoder: VideoDecoder = "pyav"


def load_video(content: bytes, name: str, reading: VideoReading, limits: MediaLimits | None = None) -> Video:
    """Decode a video.

    Args:
        content: A file's bytes.
        name: Names the video, for messages.
        reading: What is taken from it.
        limits: Bounds on bytes, pixels and seconds.

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
            frames = _frames(container, content, name, total, indices, reading)
            audio = None
            if reading.audio_rate is not None and container.streams.audio:
                container.seek(0)
                audio = _audio_track(container, name, reading.audio_rate)
            return Video(frames, indices, total, fps, audio)
    except av.error.FFmpegError as error:
        raise MediaError(f"{name}: no video that can be read ({error.strerror})", _REPLACE) from error


def _checked(container: InputContainer, name: str, limits: MediaLimits) -> tuple[int, float]:
    """Return number of frames and frames per second, of a video that says nothing against the limits."""
    if not container.streams.video:
        raise MediaError(f"{name}: no images in it", _REPLACE)
    stream = container.streams.video[0]
    _check_codec(stream, name)
    limits.check_image(name, stream.codec_context.width, stream.codec_context.height)
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
    _check_complete(name, packets, _promised_seconds(container))
    return len(packets), float(rate)


def _check_codec(stream: Stream, name: str) -> None:
    if getattr(stream, "codec_context", None) is None:  # FFmpeg has no decoder for it
        raise MediaError(f"{name}: the {stream.type} has an unsupported codec", _REPLACE)


def _promised_seconds(container: InputContainer) -> float | None:
    """Return how long the header says that the images last, if it does."""
    stream = container.streams.video[0]
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    alone = len(container.streams) == 1  # otherwise the audio clip may last longer
    return container.duration / 1_000_000 if alone and container.duration else None


def _check_complete(name: str, packets: Sequence[Any], promised: float | None) -> None:
    last = max((packet.pts or 0) * (packet.time_base or 0) for packet in packets)
    if promised is not None and promised - last > max(1.0, 0.05 * promised):
        problem = f"{name}: ends at second {float(last):.1f} of {promised:.1f}"
        raise MediaError(problem, _REPLACE)


def _frames(
    container: InputContainer, content: bytes, name: str, total: int, indices: Sequence[int], reading: VideoReading
) -> Tensor:
    wanted = set(indices)
    if reading.decoder == "torchcodec":
        try:
            found = torchcodec_frames(content, container.streams.video[0], total, wanted)
            return _resized(found, name, indices, reading)
        except TorchcodecCannotError as reason:
            logger.warning_once("some videos are decoded by PyAV, torchcodec cannot: %s", reason)
    container.seek(0)
    return _resized(pyav_frames(container, name, wanted), name, indices, reading)


def _resized(frames: Frames, name: str, indices: Sequence[int], reading: VideoReading) -> Tensor:
    found = {
        index: resize_frames(pixels[None], reading.size(len(indices), *pixels.shape[1:]))[0] for index, pixels in frames
    }
    missing = sorted(set(indices) - found.keys())
    if missing:
        raise MediaError(f"{name}: frame {missing[0] + 1} and what follows cannot be decoded", _REPLACE)
    if len({frame.shape for frame in found.values()}) > 1:
        raise MediaError(f"{name}: its frames change their size", _REPLACE)
    return torch.stack([found[index] for index in indices])


def _audio_track(container: InputContainer, name: str, rate: int) -> AudioClip:
    from av.audio.resampler import AudioResampler

    _check_codec(container.streams.audio[0], name)
    floats = AudioResampler(format="fltp")
    pieces: list[Any] = []
    given_rate = rate
    for frame in container.decode(audio=0):
        given_rate = frame.sample_rate
        pieces += [piece.to_ndarray() for piece in floats.resample(frame)]
    pieces += [piece.to_ndarray() for piece in floats.resample(None)]
    channels = np.concatenate(pieces, axis=1) if pieces else np.empty((1, 0), np.float32)
    return mono(channels, name, given_rate, rate)
