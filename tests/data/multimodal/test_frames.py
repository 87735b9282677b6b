"""torchcodec, where it can be loaded, gives the frames that PyAV gives, and leaves to PyAV what it does otherwise."""

from __future__ import annotations

import struct
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from tests.data.multimodal.families import family_for
from tests.data.multimodal.files import moving, tone, video_bytes
from tests.data.multimodal.test_videos import BAD, ROTATIONS
from veomni.data.multimodal import FeatureCache, settings_of
from veomni.data.multimodal.frames import usable_decoder
from veomni.data.multimodal.limits import MediaLimits
from veomni.data.multimodal.processor_rules import between_ends
from veomni.data.multimodal.videos import VideoReading, load_video
from veomni.errors import ConfigError, MediaError

FRAMES = moving(24, 48, 64) // 2 + np.random.default_rng(0).integers(0, 60, (24, 48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def torchcodec():
    if find_spec("torchcodec") is None:
        pytest.skip("torchcodec is not installed (pip install torchcodec; it needs FFmpeg's shared libraries)")
    try:
        import torchcodec
        import torchcodec.decoders
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"torchcodec is installed and cannot be loaded: {str(error).strip().partition(chr(10))[0]}")
    return torchcodec


def reading(decoder, sample=None, sound_rate=None):
    sample = sample or (lambda total, fps: list(range(total)))
    return VideoReading(sample, lambda frames, height, width: (height, width), sound_rate, decoder)


def both(content, **options):
    return [load_video(content, "clip", reading(decoder, **options)) for decoder in ("pyav", "torchcodec")]


def same(found, expected):
    assert (found.indices, found.total, found.fps) == (expected.indices, expected.total, expected.fps)
    assert found.timestamps == expected.timestamps
    assert torch.equal(found.frames, expected.frames)


@pytest.fixture
def only_torchcodec(torchcodec, monkeypatch):
    """PyAV decodes no frame for whoever chose torchcodec, so that the comparison is one."""
    from veomni.data.multimodal import videos

    decode = videos.pyav_frames
    calls = []

    def counted(*arguments):
        calls.append(1)
        return decode(*arguments)

    monkeypatch.setattr(videos, "pyav_frames", counted)
    yield
    assert len(calls) == 1


@pytest.mark.parametrize("size", [(48, 64), (36, 50)])
@pytest.mark.parametrize(
    ("form", "codec", "colours"),
    [
        ("matroska", "ffv1", "bgr0"), ("matroska", "ffv1", "yuv444p"), ("mp4", "libx264", "yuv420p"),
        ("mp4", "libx264", "yuvj420p"), ("mp4", "libx264", "yuv422p"), ("mp4", "libx264", "gray"),
        ("webm", "libvpx", "yuv420p"), ("webm", "libvpx-vp9", "yuv420p"), ("mp4", "mpeg4", "yuv420p"),
        ("avi", "mjpeg", "yuvj420p"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("only_torchcodec")
def test_pixels_are_those_of_pyav(form, codec, colours, size):
    content = video_bytes(FRAMES[:8, : size[0], : size[1]], form=form, codec=codec, pixel_format=colours)
    expected, found = both(content)
    same(found, expected)
    assert found.frames.shape == (8, 3, *size)


@pytest.mark.usefixtures("only_torchcodec")
def test_frames_between_key_frames_are_those_of_pyav():
    options = {"g": "7", "bf": "3"}
    content = video_bytes(moving(90, 48, 64) // 2, form="mp4", codec="libx264", pixel_format="yuv420p", options=options)

    def sample(total, fps):
        return between_ends(total, fps, wanted_fps=2, min_frames=4, max_frames=64)

    expected, found = both(content, sample=sample)
    same(found, expected)
    assert 0 < len(found.indices) < 60


@pytest.mark.usefixtures("only_torchcodec")
@pytest.mark.parametrize("degrees", ROTATIONS)
def test_frames_are_turned_as_by_pyav(degrees):
    content = bytearray(video_bytes(FRAMES[:3, :32, :48], form="mp4", codec="libx264", pixel_format="yuv444p"))
    a, b, c, d = (value << 16 for value in ROTATIONS[degrees])
    start = content.index(b"tkhd") + 44
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    expected, found = both(bytes(content))
    same(found, expected)
    assert found.frames.shape[2:] == ((32, 48) if degrees == 180 else (48, 32))


@pytest.mark.usefixtures("only_torchcodec")
def test_the_sound_is_the_same():
    content = video_bytes(FRAMES[:16], clip=tone(440, 2, 16_000)[:, 0] / 2)
    expected, found = both(content, sound_rate=8_000)
    same(found, expected)
    assert np.array_equal(found.audio.samples, expected.audio.samples)


LEFT = {
    "ten bits": video_bytes(FRAMES[:4], pixel_format="yuv420p10le"),
    "a form whose end torchcodec misses": video_bytes(
        FRAMES, form="mpegts", codec="libx264", pixel_format="yuv420p"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
@pytest.mark.usefixtures("torchcodec")
def test_pyav_decodes_what_torchcodec_would_decode_otherwise(case):
    expected, found = both(LEFT[case])
    same(found, expected)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.usefixtures("torchcodec")
def test_bad_videos_are_named(case):
    content, message = BAD[case]
    limits = MediaLimits(max_seconds=20, max_pixels=100_000)
    with pytest.raises(MediaError, match=f"clip.mp4: .*({message})"):
        load_video(content, "clip.mp4", reading("torchcodec"), limits)


@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
@pytest.mark.parametrize(("form", "codec"), [("mp4", "libx264"), ("mp4", "mpeg4"), ("webm", "libvpx")])
def test_damage_of_any_kind_is_a_media_error_or_covered_up(form, codec, decoder, request):
    if decoder == "torchcodec":
        request.getfixturevalue("torchcodec")
    options = {"movflags": "faststart"} if form == "mp4" else {}
    good = video_bytes(moving(12, 48, 64), form=form, codec=codec, pixel_format="yuv420p", options=options)
    generator, refused = np.random.default_rng(0), 0
    for _ in range(40):
        content = bytearray(good)
        start, length = int(generator.integers(len(good) // 4, len(good) - 50)), int(generator.integers(1, 40))
        content[start : start + length] = generator.integers(0, 256, length, dtype=np.uint8).tobytes()
        try:
            video = load_video(bytes(content), "clip", reading(decoder))
            assert len(video.frames) == len(video.indices) == video.total
        except MediaError:
            refused += 1
    assert refused


def test_an_unsupported_codec_is_a_media_error():
    content = video_bytes(FRAMES[:2], form="mp4", codec="libx264", pixel_format="yuv420p")
    with pytest.raises(MediaError, match="clip: the video has an unsupported codec"):
        load_video(content.replace(b"avc1", b"zzzz"), "clip", reading("pyav"))


def test_frames_that_change_their_size_are_a_media_error():
    """Two parts of a stream joined as they are; MPEG-TS may do that."""
    parts = [
        video_bytes(frames, form="mpegts", codec="libx264", pixel_format="yuv420p")
        for frames in (FRAMES[:6], FRAMES[:6, :32, :48])
    ]
    with pytest.raises(MediaError, match="clip: its frames change their size"):
        load_video(b"".join(parts), "clip", reading("pyav"))


# ---------------------------------------------------------------- who decodes


def test_without_torchcodec_the_choice_is_an_error(monkeypatch):
    monkeypatch.setattr("veomni.data.multimodal.frames.find_spec", lambda name: None)
    assert usable_decoder("pyav") == "pyav"
    with pytest.raises(ConfigError, match=r"video_decoder is torchcodec, which is not installed"):
        family_for("qwen2_vl", video_decoder="torchcodec")


def test_libraries_that_cannot_be_loaded_leave_it_to_pyav(tmp_path, monkeypatch, caplog):
    """A package that fails to import as torchcodec does without FFmpeg, or with another torch."""
    package = tmp_path / "torchcodec"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('Could not load libtorchcodec. Likely causes: ...')\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("veomni.logging.warned_once", set())
    families = [family_for("qwen2_vl", video_decoder="torchcodec") for _ in range(2)]
    assert [family.video_decoder for family in families] == ["pyav", "pyav"]
    said = [record.getMessage() for record in caplog.records if "torchcodec" in record.getMessage()]
    assert len(said) == 1
    assert "cannot be loaded (Could not load libtorchcodec. Likely causes: ...): videos are decoded by PyAV" in said[0]


@pytest.mark.usefixtures("torchcodec")
def test_features_of_both_are_kept_apart(tmp_path):
    families = [family_for("qwen2_vl", video_decoder=decoder) for decoder in ("pyav", "torchcodec")]
    paths = [FeatureCache(tmp_path, 1, settings_of(family)).path("video", b"content") for family in families]
    assert paths[0] != paths[1]


def test_models_without_videos_have_no_such_choice():
    with pytest.raises(ConfigError, match=r"video_decoder: the processor of llava models has no"):
        family_for("llava", video_decoder="torchcodec")
