"""Files and media of the tables, made from what a row states of them."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.data.multimodal.files import bomb, image_bytes, moving, pixels, png, sound_bytes, tone, video_bytes
from tests.data.stream_files import add

NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8))
GOOD = image_bytes(Image.fromarray(pixels()))
H264: dict[str, Any] = {"form": "mp4", "codec": "libx264", "pixel_format": "yuv420p"}


def file_bytes(
    lines: list[Any] | None = None, text: str | None = None, latin1: str | None = None,
    parquet: dict[str, list[Any]] | None = None, tar: list[list[str]] | None = None,
    member: dict[str, Any] | None = None, compress: bool = False, times: int = 1, keep: float | None = None,
) -> bytes:  # fmt: skip
    """Return a file: JSON lines (a string is a line already), text, bytes, a table, or a tar archive of members.

    Args:
        member: What all members of the archive claim, such as their type.
        compress: Write it with gzip.
        times: How often it is repeated.
        keep: See :func:`cut`.
    """
    if lines is not None:
        content = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    elif tar is not None:
        content = tar_bytes(tar, **member or {})
    elif parquet is not None:
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table(parquet), buffer)
        content = buffer.getvalue().to_pybytes()
    else:
        content = text.encode() if text is not None else (latin1 or "").encode("latin-1")
    content *= times
    return cut(gzip.compress(content) if compress else content, keep)


def tar_bytes(members: list[list[str]], type: str = "REGTYPE", **claims: Any) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, body in members:
            add(archive, name, body.encode("latin-1"), type=getattr(tarfile, type), **claims)
    return content.getvalue()


def cut(content: bytes, keep: float | None) -> bytes:
    """Keep so many bytes, or all but so many, or a share of them below 1."""
    if keep is None:
        return content
    return content[: int(len(content) * keep) if 0 < keep < 1 else int(keep)]


def image(of: Any = "pixels", form: str = "PNG", keep: float | None = None, pad: int = 0) -> bytes:
    """Return smooth pixels, noise, or ``[mode, width, height]`` without content, with zeros behind it."""
    picture = {"pixels": Image.fromarray(pixels()), "noise": NOISE}[of] if isinstance(of, str) else blank(*of)
    return cut(image_bytes(picture, form), keep) + b"\0" * pad


def blank(mode: str, width: int, height: int) -> Image.Image:
    return Image.new(mode, (width, height))


def claimed_png(width: int, height: int, data: str | None = None) -> bytes:
    return png(width, height, data=None if data is None else zlib.compress(data.encode("latin-1")))


def sound(
    seconds: float = 0.5, hertz: float = 300, rate: int = 16_000, shape: list[int] | None = None, value: float = 0.0,
    form: str = "WAV", subtype: str = "FLOAT", keep: float | None = None,
) -> bytes:  # fmt: skip
    """Return a tone, or samples ``[length, channels]`` of one value."""
    samples = tone(hertz, seconds, rate) if shape is None else np.full(shape, value, np.float32)
    return cut(sound_bytes(samples, rate, form, subtype), keep)


def video(frames: int, size: int = 48, fps: int = 8, index: str = "lossless", keep: float | None = None) -> bytes:
    """Return a lossless video, or an mp4 whose index is at the ``front`` or at the ``end``."""
    pictures = moving(frames, size, size)
    options = {"movflags": "faststart"} if index == "front" else None
    return cut(video_bytes(pictures, fps=fps, **{} if index == "lossless" else {**H264, "options": options}), keep)


MAKERS: dict[str, Any] = {
    "image": image, "png": claimed_png, "bomb": bomb, "sound": sound, "video": video, "file": file_bytes,
}  # fmt: skip
