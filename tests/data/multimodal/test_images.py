from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from tests.data.multimodal.files import bomb, image_bytes, opened, pixels, png
from veomni.data.multimodal.images import load_image, upright_size
from veomni.data.multimodal.limits import MediaLimits
from veomni.data.multimodal.processor_rules import smart_resize
from veomni.errors import MediaError

RGB = pixels()
NOISE = np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)


def load(image, **options):
    return np.asarray(load_image(image_bytes(image, **options), "file"))


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(form):
    assert np.array_equal(load(Image.fromarray(RGB), form=form), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    turns = [
        RGB, RGB[:, ::-1], RGB[::-1, ::-1], RGB[::-1], RGB.transpose(1, 0, 2), np.rot90(RGB, -1),
        RGB[::-1, ::-1].transpose(1, 0, 2), np.rot90(RGB),
    ]  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    assert np.array_equal(load(Image.fromarray(RGB), exif=exif), turns[orientation - 1])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_keeps_the_image():
    content = image_bytes(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 7)
    assert load_image(content, "file").size == (30, 20)


def test_16_bit_grey_is_scaled_and_not_cut_off():
    grey = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    found = load(Image.fromarray(grey))
    assert np.array_equal(found, np.repeat(np.round(grey / 257)[..., None], 3, -1).astype(np.uint8))
    assert len(np.unique(found)) == 256


def test_cmyk_and_palette_and_one_bit_become_rgb():
    image = Image.fromarray(RGB)
    assert np.array_equal(load(image.convert("CMYK"), form="TIFF"), np.asarray(image.convert("CMYK").convert("RGB")))
    palette = image.quantize(16)
    assert np.array_equal(load(palette), np.asarray(palette.convert("RGB")))
    assert set(np.unique(load(image.convert("1")))) == {0, 255}


def test_transparency_is_put_on_white():
    alpha = np.linspace(0, 255, 600).reshape(20, 30, 1).astype(np.uint8)
    found = load(Image.fromarray(np.concatenate([RGB, alpha], -1)))
    expected = RGB * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(found - expected).max() <= 1
    grey = load(Image.fromarray(np.concatenate([RGB[..., :1], alpha], -1), "LA"))
    assert np.abs(grey - expected[..., :1]).max() <= 1


def test_a_transparent_palette_colour_is_put_on_white():
    image = Image.fromarray(np.zeros((4, 4, 3), np.uint8)).quantize(2)
    assert (load(image, transparency=image.getpixel((0, 0))) == 255).all()


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_used(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    content = image_bytes(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert opened(content).n_frames == 3
    assert (np.asarray(load_image(content, "file")) == (255, 0, 0)).all()


def test_that_only_the_first_frame_is_used_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr("veomni.logging.warned_once", set())
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    content = image_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for name in ("a.gif", "b.gif"):
        load_image(content, name)
    assert caplog.text.count("only the first is used") == 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF", "BMP", "PPM", "JPEG2000"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_the_header_says_how_large_an_image_becomes(form, orientation):
    exif = Image.Exif()
    if orientation:
        exif[274] = orientation
    content = image_bytes(Image.fromarray(RGB), form, exif=exif.tobytes())
    assert upright_size(content, "file") == load_image(content, "file").size


def test_an_orientation_behind_the_pixels_of_a_png_counts():
    from PIL import PngImagePlugin

    recorded = PngImagePlugin.PngInfo()
    recorded.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    written = image_bytes(Image.fromarray(RGB), pnginfo=recorded)
    start = written.index(b"iTXt") - 4
    chunk = written[start : start + 12 + int.from_bytes(written[start : start + 4], "big")]
    content = written.replace(chunk, b"").replace(*(part + written[-12:] for part in (b"", chunk)))
    assert content.index(b"iTXt") > content.index(b"IDAT")
    assert upright_size(content, "file") == load_image(content, "file").size == (20, 30)


def test_the_header_is_enough_for_the_size(monkeypatch):
    contents = [image_bytes(Image.fromarray(RGB), form) for form in ("JPEG", "PNG", "WEBP")]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert {upright_size(content, "file") for content in contents} == {(30, 20)}


def test_an_opened_image_is_not_turned_itself():
    exif = Image.Exif()
    exif[274] = 6
    given = opened(image_bytes(Image.fromarray(RGB), "JPEG", exif=exif))
    assert load_image(given, "given").size == upright_size(given, "given") == (20, 30)
    assert given.size == (30, 20)


def test_an_opened_image_is_treated_alike():
    image = Image.fromarray(np.concatenate([RGB, np.zeros((20, 30, 1), np.uint8)], -1))
    assert (np.asarray(load_image(image, "given")) == 255).all()


BAD = {
    "HTML": (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page, no image"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "XML, no image"),
    "PostScript, which Pillow would hand to another program": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PDF or PostScript document"),
    "random bytes": (bytes(range(200, 256)), "begins with b'\\\\xc8"),
    "a truncated JPEG": (image_bytes(Image.fromarray(NOISE), "JPEG")[:3000], "the JPEG is damaged .*truncated"),
    "a JPEG cut in its header": (image_bytes(form="JPEG")[:300], "the header is damaged"),
    "a truncated PNG": (image_bytes(Image.fromarray(NOISE))[:5000], "the PNG is damaged"),
    "a PNG cut in its header": (image_bytes()[:20], "no image|header is damaged"),
    "a PNG with a damaged checksum": (image_bytes().replace(b"IDAT", b"IDAU"), "damaged|no image"),
    "a decompression bomb": (bomb(), "10000 x 10000 is 100000000 pixels, more than 64000000"),
    "a header of 60000 x 60000": (png(60_000, 60_000), "more than 64000000|exceeds limit"),
    "no pixels": (png(0, 0), "0 x 0|no image|damaged"),
    "one row of many pixels": (image_bytes(Image.new("L", (10_000, 1))), "aspect ratio of 10000, more than 200"),
    "one column of many pixels": (image_bytes(Image.new("L", (1, 10_000))), "aspect ratio of 10000"),
    "32 bit floats": (image_bytes(Image.new("F", (4, 4)), "TIFF"), "'F' pixels .* no known range"),
    "32 bit integers": (image_bytes(Image.new("I", (4, 4), 70_000), "TIFF"), "70000 have no known range"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_named(case):
    content, message = BAD[case]
    with pytest.raises(MediaError, match=f"holiday.jpg: .*({message})") as raised:
        load_image(content, "holiday.jpg")
    assert raised.value.fix


def test_nothing_is_decoded_beyond_the_limits(monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    for content in (bomb(), image_bytes(Image.new("L", (1, 10_000)))):
        with pytest.raises(MediaError):
            load_image(content, "file")


def test_limits_may_be_changed():
    content = image_bytes(Image.new("L", (300, 1)))
    assert load_image(content, "file", MediaLimits(max_aspect_ratio=300)).size == (300, 1)
    with pytest.raises(MediaError, match="more than 200"):
        load_image(content, "file")


SIDES = [1, 5, 14, 27, 28, 29, 41, 42, 43, 70, 98, 199, 224, 333, 640, 1080, 1919, 2160, 4001]


@pytest.mark.parametrize("factor", [28, 32, 8])
@pytest.mark.parametrize("bounds", [(56 * 56, 28 * 28 * 1280), (1, 10_000), (200_000, 4_000_000)])
def test_smart_resize_is_that_of_transformers(factor, bounds):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as expected

    for height, width in itertools.product(SIDES, SIDES):
        if max(height, width) / min(height, width) > 200:
            continue
        found = smart_resize(height, width, factor=factor, min_pixels=bounds[0], max_pixels=bounds[1])
        assert found == expected(height, width, factor, *bounds)


@pytest.mark.parametrize("frames", [2, 3, 5, 8, 17])
@pytest.mark.parametrize("bounds", [(128 * 28 * 28, 28 * 28 * 768), (112 * 112, 28 * 28 * 2 * 30000)])
def test_smart_resize_of_frames_is_that_of_transformers(frames, bounds):
    from transformers.models.glm4v.video_processing_glm4v import smart_resize as expected

    for height, width in itertools.product(SIDES, SIDES):
        given = {"factor": 28, "min_pixels": bounds[0], "max_pixels": bounds[1], "temporal_factor": 2}
        try:
            size = expected(frames, height, width, **given)
        except ValueError:
            with pytest.raises(ValueError, match="200 times"):
                smart_resize(height, width, frames=frames, enlarge=True, **given)
        else:
            assert smart_resize(height, width, frames=frames, enlarge=True, **given) == size


def test_jpeg_is_close_to_the_original():
    smooth = pixels(64, 64) // 4
    assert np.abs(load(Image.fromarray(smooth), form="JPEG", quality=95).astype(int) - smooth).mean() < 3
