"""Images, as bytes, good and bad, made on the spot."""

from __future__ import annotations

import io
import struct
import zlib
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
