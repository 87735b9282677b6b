"""Images to RGB, upright, in 8 bits. What a file claims is checked before a pixel is decoded; it may be asked alone."""

import io
import os
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from veomni.data.multimodal.limits import DEFAULT_LIMITS, MediaLimits, unusable
from veomni.errors import MediaError
from veomni.logging import create_logger

logger = create_logger(__name__)

# Raster formats only: others of Pillow's call other programs (EPS), or are rare enough to be little tested.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "AVIF", "JPEG2000")
_NO_IMAGES = {
    (b"<!doctype html", b"<html"): "an HTML page", (b"<?xml", b"<svg"): "XML",
    (b"%pdf", b"%!ps"): "a PDF or PostScript document",
}  # fmt: skip
_KEPT_BLOCKS = 4  # of at most 16 MiB
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # in EXIF


def load_image(content: bytes | Image.Image, name: str, limits: MediaLimits = DEFAULT_LIMITS) -> Image.Image:
    """Return an image as RGB: turned as its EXIF orientation says, transparency on white, of an animation the first.

    16-bit grey is scaled to 8 bits. Colour profiles are not applied, as in transformers' processors. ``content`` is a
    file's bytes or an opened image, ``name`` names it in messages (MediaError: no image, damaged, beyond the limits).
    """
    image = _open(content, name) if isinstance(content, bytes) else content
    limits.check_image(name, image.width, image.height)
    if getattr(image, "is_animated", False):
        logger.warning_once("of images with several frames (animations) only the first is used")
    try:
        image.load()
    except Exception as error:  # the decoders raise many kinds: OSError, SyntaxError, ValueError, struct.error
        raise unusable(f"{name}: the {image.format or 'image'} is damaged ({_reason(error)})") from error
    return _to_rgb(_upright(image, ours=isinstance(content, bytes)), name)


def upright_size(content: bytes | Image.Image, name: str, limits: MediaLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Return width and height of what :func:`load_image` returns, from the header where it has them."""
    image = _open(content, name) if isinstance(content, bytes) else content
    if not isinstance(content, bytes) or not _in_header(image.format, content):
        return load_image(image, name, limits).size
    limits.check_image(name, image.width, image.height)
    try:
        turned = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    except Exception:  # `_upright` says so
        turned = False
    return (image.height, image.width) if turned else image.size


def _in_header(form: str | None, content: bytes) -> bool:
    """Return whether Pillow has an image's size and orientation before it decodes it."""
    if form == "PNG":  # they may stand behind the pixels
        return not any(mark in content for mark in (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp"))
    return form in ("JPEG", "MPO", "WEBP")


def _open(content: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limits decide, with an error
            return Image.open(io.BytesIO(content), formats=_known_formats())
    except UnidentifiedImageError as error:
        raise unusable(f"{name}: {_instead(content)}, no image") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name}: {_reason(error)}", "make the image smaller") from error
    except Exception as error:  # headers that contradict themselves raise many kinds
        raise unusable(f"{name}: the header is damaged ({_reason(error)})") from error


@lru_cache(maxsize=1)
def _known_formats() -> list[str]:
    Image.init()
    if "PILLOW_BLOCKS_MAX" not in os.environ:
        # Pillow would give the memory of every image back, and the system would clear it for the next one.
        Image.core.set_blocks_max(_KEPT_BLOCKS)  # type: ignore[attr-defined]
    return [kind for kind in _FORMATS if kind in Image.OPEN]


def _instead(content: bytes) -> str:
    """Say what a file that is no image seems to be."""
    start = content[:512].lstrip().lower()
    named = (what for beginnings, what in _NO_IMAGES.items() if start.startswith(beginnings))
    return next(named, f"a file that begins with {content[:8]!r}")


def _upright(image: Image.Image, *, ours: bool) -> Image.Image:
    try:
        if not ours:
            return ImageOps.exif_transpose(image)
        ImageOps.exif_transpose(image, in_place=True)  # what lies right is not copied
        return image
    except Exception as error:  # EXIF is a TIFF within the file, and may be damaged alone
        logger.warning_once("images with unreadable EXIF are not turned (%s)", type(error).__name__)
        return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        if image.mode.startswith("I") or image.mode == "F":
            return _from_numbers(image, name)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except (ValueError, OSError) as error:
        raise unusable(f"{name}: mode {image.mode} cannot become RGB ({_reason(error)})") from error


def _from_numbers(image: Image.Image, name: str) -> Image.Image:
    """Scale 16 bits to 8; Pillow itself would cut everything above 255 off."""
    numbers: Any = np.asarray(image)
    if image.mode == "F" or numbers.min() < 0 or numbers.max() > 0xFFFF:
        problem = f"{name}: {image.mode!r} pixels from {numbers.min()} to {numbers.max()} have no known range"
        raise MediaError(problem, "save it with 8 or 16 bits per channel")
    return Image.fromarray(np.round(numbers / 257).astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
