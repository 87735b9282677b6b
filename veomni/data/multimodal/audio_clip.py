"""Audio clips to one channel of 32-bit floats at the sampling rate of a model."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veomni.data.multimodal.limits import MediaLimits
from veomni.errors import MediaError, MissingExtraError
from veomni.logging import create_logger

logger = create_logger(__name__)

_REPLACE = "replace the file, or remove the record"
_SIZED = ((b"RIFF", b"WAVE"), (b"FORM", b"AIFF"), (b"FORM", b"AIFC"))  # beginnings with the size between
_CARELESS_BYTES = 16  # by which some programs count their own headers wrongly


@dataclass(frozen=True)
class AudioClip:
    """One channel.

    Attributes:
        samples: float32 ``[samples]``, between -1 and 1 unless the file holds larger floats.
        rate: Samples per second.
    """

    samples: NDArray[np.float32]
    rate: int


def load_audio(content: bytes, name: str, rate: int, limits: MediaLimits | None = None) -> AudioClip:
    """Return the mean of an audio file's channels, resampled by ``soxr`` (high quality) as librosa and transformers do.

    Formats are libsndfile's: WAV, FLAC, Ogg, MP3, AIFF and others.

    Args:
        content: A file's bytes.
        name: Names the audio clip, for messages.
        rate: Samples per second to return.
        limits: Bounds on bytes, pixels and seconds.

    Raises:
        MediaError: it is no audio, damaged, without samples, or too long.
        MissingExtraError: soundfile or soxr is not installed.
    """
    limits = limits or MediaLimits()
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError("soundfile", "audio") from error
    _check_complete(content, name)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            limits.check_duration(name, file.frames / file.samplerate)
            samples = file.read(dtype="float32", always_2d=True)
            if len(samples) < file.frames:
                raise MediaError(f"{name}: ends after {len(samples)} of {file.frames} samples", _REPLACE)
            return mono(samples.T, name, file.samplerate, rate)
    except soundfile.SoundFileError as error:
        raise MediaError(f"{name}: no audio that can be read ({error})", _REPLACE) from error


def _check_complete(content: bytes, name: str) -> None:
    """Raise MediaError for a WAV or AIFF shorter than it says; libsndfile would take what is left of it."""
    if (content[:4], content[8:12]) not in _SIZED:
        return
    promised = int.from_bytes(content[4:8], "little" if content[:4] == b"RIFF" else "big") + 8
    streamed = promised - 8 in (0, 0xFFFFFFFF)  # it was not known when the header was written
    if not streamed and len(content) < promised - _CARELESS_BYTES:
        raise MediaError(f"{name}: ends after {len(content)} of {promised} bytes", _REPLACE)


def mono(channels: NDArray[np.float32], name: str, given_rate: int, rate: int) -> AudioClip:
    """Return the mean of ``[channels, samples]`` at another rate.

    Raises:
        MediaError: there are no samples, or some are not finite.
        MissingExtraError: soxr is not installed.
    """
    if channels.size == 0:
        raise MediaError(f"{name}: an audio clip without samples", _REPLACE)
    samples: Any = channels.mean(0, dtype=np.float32)
    if not np.isfinite(samples).all():
        raise MediaError(f"{name}: samples that are not finite", _REPLACE)
    if not samples.any():
        logger.warning_once("some audio clips are silent from begin to end")
    if given_rate != rate:
        samples = _resampled(samples, given_rate, rate)
    return AudioClip(np.ascontiguousarray(samples, np.float32), rate)


def _resampled(samples: NDArray[np.float32], given_rate: int, rate: int) -> NDArray[np.float32]:
    try:
        import soxr
    except ImportError as error:
        raise MissingExtraError("soxr", "audio") from error
    return soxr.resample(samples, given_rate, rate, quality="HQ")
