"""Scans of handwritten digits, as conversations with an image: the 1,797 that come with scikit-learn.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998: 8 x 8
pixels in 17 shades, by 13 writers. Every fifth scan is held out.
"""

import io
from collections.abc import Iterator
from typing import Any

from veomni.errors import MissingExtraError

_HELD_OUT = 5
_SHADES = 16


def handwritten_digits(part: str) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Yield question, answer and image of ``train`` or ``test``; MissingExtraError without scikit-learn."""
    for shades, digit in _scans(part):
        yield "<image>Which digit is this?", str(digit), {"images": _png(shades.reshape(8, 8) / _SHADES)}


def digit_drawings(part: str) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, bytes]]]:
    """Yield the same scans as answers, to be drawn: 64 codes of 17 shades, row by row."""
    for shades, digit in _scans(part):
        yield f"Draw the digit {digit}.", [{"type": "codes", "codes": shades.astype(int).tolist()}], {}


def _scans(part: str) -> list[tuple[Any, int]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "dev") from error
    scans = zip(*load_digits(return_X_y=True), strict=True)
    return [scan for number, scan in enumerate(scans) if (number % _HELD_OUT == 0) == (part == "test")]


def _png(shades: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((shades * 255).round().astype("uint8")).save(file, "PNG")
    return file.getvalue()
