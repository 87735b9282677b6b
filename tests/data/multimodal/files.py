"""Images, audio clips and videos, as bytes, good and bad, made on the spot."""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def pixels(height: int = 20, width: int = 30, channels: int = 3, seed: int = 0) -> Any:
    """Smooth colours, so that lossy formats keep them."""
    y, x = np.mgrid[:height, :width]
    planes = [(x * (3 + c) + y * (5 - c) + 40 * c + seed) % 256 for c in range(channels)]
    return np.stack(planes, -1).astype(np.uint8)


def image_bytes(image: Image.Image | None = None, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(pixels())).save(file, form, **options)
    return file.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def png(width: int, height: int, *, bits: int = 8, colour: int = 0, data: bytes | None = None) -> bytes:
    """A PNG written by hand, that may claim what it likes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data or b"") + chunk(b"IEND", b"")


def bomb(side: int = 10_000) -> bytes:
    """About 12 KB that decode to ``side`` x ``side`` pixels of one bit."""
    row = b"\0" + b"\0" * (side // 8)
    return png(side, side, bits=1, data=zlib.compress(row * side, 9))


def tone(hertz: float, seconds: float, rate: int, channels: int = 1) -> Any:
    """A sine, float32 ``[samples, channels]``, of half the amplitude in every further channel."""
    wave = np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.stack([wave / 2**channel for channel in range(channels)], -1).astype(np.float32)


def sound_bytes(samples: Any, rate: int = 16_000, form: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


def moving(frames: int, height: int = 48, width: int = 64) -> Any:
    """Frames ``[frames, height, width, 3]`` that all differ."""
    return np.stack([pixels(height, width, seed=11 * number) for number in range(frames)])


def video_bytes(
    frames: Any, fps: int = 8, form: str = "matroska", codec: str = "ffv1", pixel_format: str = "bgr0",
    clip: Any = None, rate: int = 16_000, options: dict[str, str] | None = None,
) -> bytes:  # fmt: skip
    """A video, lossless by default."""
    import av

    handle, path = tempfile.mkstemp()  # an index at the front is written by reading the file again
    os.close(handle)
    with av.open(path, "w", format=form, options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixel_format
        audio: Any = None if clip is None else container.add_stream("flac", rate=rate, layout="mono")
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
        if audio is not None:
            whole = av.AudioFrame.from_ndarray((clip.reshape(1, -1) * 32767).astype(np.int16), "s16", "mono")
            whole.sample_rate, whole.pts = rate, 0
            container.mux(audio.encode(whole))
            container.mux(audio.encode())
    content = Path(path).read_bytes()
    os.unlink(path)
    return content
