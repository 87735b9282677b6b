"""Audio clips to one channel of 32-bit floats at the sampling rate of a model."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veomni.data.multimodal.limits import DEFAULT_LIMITS, MediaLimits, unusable
from veomni.errors import MissingExtraError
from veomni.logging import create_logger

logger = create_logger(__name__)

_SIZED = ((b"RIFF", b"WAVE"), (b"FORM", b"AIFF"), (b"FORM", b"AIFC"))  # beginnings with the size between
_CARELESS_BYTES = 16  # by which some programs count their own headers wrongly


@dataclass(frozen=True)
class AudioClip:
    """One channel, ``[samples]`` between -1 and 1 unless the file holds larger floats, at ``rate`` per second."""

    samples: NDArray[np.float32]
    rate: int


def load_audio(content: bytes, name: str, rate: int, limits: MediaLimits = DEFAULT_LIMITS) -> AudioClip:
    """Return the mean of an audio file's channels, resampled by ``soxr`` (high quality) as librosa and transformers do.

    Formats are libsndfile's: WAV, FLAC, Ogg, MP3, AIFF and others. ``content`` is a file's bytes, ``name`` names it in
    messages, ``rate`` is in samples per second. MediaError for what is no audio, damaged, without samples, or too long;
    MissingExtraError without soundfile or soxr.
    """
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
                raise unusable(f"{name}: ends after {len(samples)} of {file.frames} samples")
            return mono(samples.T, name, file.samplerate, rate)
    except soundfile.SoundFileError as error:
        raise unusable(f"{name}: no audio that can be read ({error})") from error


def _check_complete(content: bytes, name: str) -> None:
    """Raise MediaError for a WAV or AIFF shorter than it says; libsndfile would take what is left of it."""
    if (content[:4], content[8:12]) not in _SIZED:
        return
    promised = int.from_bytes(content[4:8], "little" if content[:4] == b"RIFF" else "big") + 8
    streamed = promised - 8 in (0, 0xFFFFFFFF)  # it was not known when the header was written
    if not streamed and len(content) < promised - _CARELESS_BYTES:
        raise unusable(f"{name}: ends after {len(content)} of {promised} bytes")


def mono(channels: NDArray[np.float32], name: str, given_rate: int, rate: int) -> AudioClip:
    """Return the mean of ``[channels, samples]`` at another rate; MediaError for no samples, or some not finite."""
    if channels.size == 0:
        raise unusable(f"{name}: an audio clip without samples")
    samples: Any = channels.mean(0, dtype=np.float32)
    if not np.isfinite(samples).all():
        raise unusable(f"{name}: samples that are not finite")
    if not samples.any():
        logger.warning_once("some audio clips are silent from begin to end")
    if given_rate != rate:
        try:
            import soxr
        except ImportError as error:
            raise MissingExtraError("soxr", "audio") from error
        samples = soxr.resample(samples, given_rate, rate, quality="HQ")
    return AudioClip(np.ascontiguousarray(samples, np.float32), rate)
