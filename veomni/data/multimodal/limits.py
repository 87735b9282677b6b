"""How large media may be, checked before anything is decoded."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from veomni.errors import MediaError


def unusable(problem: str) -> MediaError:
    """Return the error about a file that nothing but another file can replace."""
    return MediaError(problem, "replace the file, or remove the record")


@dataclass(frozen=True)
class MediaLimits:
    """What is rejected. A file says how large it decodes; a few kilobytes may become gigabytes.

    Attributes:
        max_bytes: Largest file.
        max_pixels: Most pixels of an image or frame before resizing.
        max_aspect_ratio: Longest side over shortest side; transformers' Qwen processors reject more than 200.
        max_seconds: Longest video or audio clip.
    """

    max_bytes: Annotated[int, Ge(1)] = 1 << 29
    max_pixels: Annotated[int, Ge(1)] = 64_000_000
    max_aspect_ratio: Annotated[float, Ge(1)] = 200.0
    max_seconds: Annotated[float, Gt(0)] = 3600.0

    def check_bytes(self, name: str, size: int) -> None:
        """Raise MediaError for an empty or too large file."""
        if size == 0:
            raise unusable(f"{name}: the file is empty")
        if size > self.max_bytes:
            problem = f"{name}: {size} bytes, more than {self.max_bytes}"
            raise MediaError(problem, "raise max_bytes", "MediaLimits.max_bytes")

    def check_image(self, name: str, width: int, height: int) -> None:
        """Raise MediaError for an image without pixels, with too many, or too far from square."""
        if width < 1 or height < 1:
            raise unusable(f"{name}: {width} x {height} pixels")
        if width * height > self.max_pixels:
            problem = f"{name}: {width} x {height} is {width * height} pixels, more than {self.max_pixels}"
            raise MediaError(problem, "make it smaller, or raise max_pixels", "MediaLimits.max_pixels")
        ratio, most = max(width, height) / min(width, height), self.max_aspect_ratio
        if ratio > most:
            problem = f"{name}: {width} x {height} has an aspect ratio of {ratio:.0f}, more than {most:g}"
            raise MediaError(problem, "crop it, or remove the record")

    def check_duration(self, name: str, seconds: float) -> None:
        """Raise MediaError for a video or audio clip that lasts too long."""
        if seconds > self.max_seconds:
            problem = f"{name}: {seconds:.1f} seconds, more than {self.max_seconds:g}"
            raise MediaError(problem, "cut it, or raise max_seconds", "MediaLimits.max_seconds")


DEFAULT_LIMITS = MediaLimits()
