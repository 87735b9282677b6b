"""Videos to frames in RGB, only those a model sees, resized as they are decoded so that memory stays bounded."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veomni.data.multimodal import frames as decoders
from veomni.data.multimodal.audio_clip import AudioClip, mono
from veomni.data.multimodal.limits import DEFAULT_LIMITS, MediaLimits, unusable
from veomni.data.multimodal.pixels import resize_frames
from veomni.data.multimodal.processor_rules import Size
from veomni.errors import MissingExtraError
from veomni.logging import create_logger

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.stream import Stream

logger = create_logger(__name__)

_MICROSECONDS = 1_000_000  # FFmpeg's unit of durations
# Of FFmpeg's formats, those that hold their media themselves: a playlist would make it open other files and addresses.
_FORMATS = "mov,mp4,m4a,3gp,matroska,webm,avi,mpegts,mpeg,mpegvideo,ogg,flv,asf,gif"


@dataclass(frozen=True)
class Video:
    """Frames of a video, uint8 ``[frames, 3, height, width]``, out of a file of ``total`` at ``fps`` per second.

    ``indices`` are their places in the file, ascending; the last may be there twice.
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

    ``sample`` is given number of frames and frames per second, and returns the frames that are seen; ``size`` is given
    their number, height and width. ``audio_rate`` is in samples per second; None leaves the audio track out.
    """

    sample: Callable[[int, float], Sequence[int]]
    size: Callable[[int, int, int], Size]
    audio_rate: int | None = None
    decoder: decoders.VideoDecoder = "pyav"


def load_video(content: bytes, name: str, reading: VideoReading, limits: MediaLimits = DEFAULT_LIMITS) -> Video:
    """Decode a video; ``content`` is a file's bytes, ``name`` names it in messages.

    Raises MediaError where it is no video, damaged, cut short, or beyond the limits; MissingExtraError without PyAV.
    """
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
        raise unusable(f"{name}: no video that can be read ({error.strerror})") from error


def _checked(container: InputContainer, name: str, limits: MediaLimits) -> tuple[int, float]:
    """Return number of frames and frames per second of a video whose header keeps to the limits and is true."""
    if not container.streams.video:
        raise unusable(f"{name}: no images in it")
    stream = container.streams.video[0]
    _check_codec(stream, name)
    limits.check_image(name, stream.codec_context.width, stream.codec_context.height)
    if container.duration:
        limits.check_duration(name, container.duration / _MICROSECONDS)
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise unusable(f"{name}: no frames per second in it")
    packets = [packet for packet in container.demux(stream) if packet.size > 0]
    if not packets:
        raise unusable(f"{name}: no frames in it")
    limits.check_duration(name, len(packets) / float(rate))
    if len(packets) < stream.frames:
        raise unusable(f"{name}: ends after {len(packets)} of {stream.frames} frames")
    promised, last = _promised_seconds(container), max((one.pts or 0) * (one.time_base or 0) for one in packets)
    if promised is not None and promised - last > max(1.0, 0.05 * promised):
        raise unusable(f"{name}: ends at second {float(last):.1f} of {promised:.1f}")
    return len(packets), float(rate)


def _check_codec(stream: Stream, name: str) -> None:
    if getattr(stream, "codec_context", None) is None:  # FFmpeg has no decoder for it
        raise unusable(f"{name}: the {stream.type} has an unsupported codec")


def _promised_seconds(container: InputContainer) -> float | None:
    """Return how long the header says that the images last, if it does."""
    stream = container.streams.video[0]
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    alone = len(container.streams) == 1  # otherwise the audio clip may last longer
    return container.duration / _MICROSECONDS if alone and container.duration else None


def _frames(
    container: InputContainer, content: bytes, name: str, total: int, indices: Sequence[int], reading: VideoReading
) -> Tensor:
    def resized(pixels: Tensor) -> Tensor:
        return resize_frames(pixels[None], reading.size(len(indices), *pixels.shape[1:]))[0]

    wanted = set(indices)
    found: dict[int, Tensor] | None = None
    if reading.decoder == "torchcodec":
        decoded = decoders.torchcodec_frames(content, container.streams.video[0], total, wanted)
        try:
            found = {index: resized(pixels) for index, pixels in decoded}
        except decoders.TorchcodecCannotError as reason:
            logger.warning_once("some videos are decoded by PyAV, torchcodec cannot: %s", reason)
    if found is None:
        container.seek(0)
        found = {index: resized(pixels) for index, pixels in decoders.pyav_frames(container, name, wanted)}
    missing = sorted(wanted - found.keys())
    if missing:
        raise unusable(f"{name}: frame {missing[0] + 1} and what follows cannot be decoded")
    if len({frame.shape for frame in found.values()}) > 1:
        raise unusable(f"{name}: its frames change their size")
    return torch.stack([found[index] for index in indices])


def _audio_track(container: InputContainer, name: str, rate: int) -> AudioClip:
    from av.audio.resampler import AudioResampler

    _check_codec(container.streams.audio[0], name)
    floats, given_rate = AudioResampler(format="fltp"), rate
    pieces: list[Any] = []
    for frame in chain(container.decode(audio=0), [None]):  # None takes what the resampler still holds
        given_rate = frame.sample_rate if frame else given_rate
        pieces += [piece.to_ndarray() for piece in floats.resample(frame)]
    channels = np.concatenate(pieces, axis=1) if pieces else np.empty((1, 0), np.float32)
    return mono(channels, name, given_rate, rate)
