from __future__ import annotations

import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.multimodal.families import VIDEOS, family_for, oracle, tokenizer_of, transform_for
from tests.data.multimodal.files import image_bytes, moving, tone, video_bytes
from veomni.data.multimodal.limits import MediaLimits
from veomni.data.multimodal.pixels import Normalization, patchify, resize_frames
from veomni.data.multimodal.processor_rules import at_seconds, between_ends, evenly_by_rate, from_middles
from veomni.data.multimodal.videos import VideoReading, load_video
from veomni.data.sources.records import Document
from veomni.errors import DataError, MediaError

FRAMES = moving(24)
SEEN = [
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "some words"}]},
]
WHOLE = VideoReading(lambda total, fps: list(range(total)), lambda frames, height, width: (height, width))


def every(step):
    return VideoReading(lambda total, fps: range(0, total, step), WHOLE.size)


@pytest.mark.parametrize("form", ["matroska", "avi"])
def test_frames_are_those_of_the_file(form):
    video = load_video(video_bytes(FRAMES, form=form), "clip", every(5))
    assert video.indices == [0, 5, 10, 15, 20]
    assert (video.total, video.fps) == (24, 8)
    assert np.array_equal(video.frames.permute(0, 2, 3, 1).numpy(), FRAMES[::5])
    assert video.timestamps == [0, 0.625, 1.25, 1.875, 2.5]


@pytest.mark.parametrize(
    ("form", "codec"), [("mp4", "libx264"), ("mp4", "mpeg4"), ("webm", "libvpx"), ("mpegts", "libx264")]
)
def test_lossy_formats_are_read(form, codec):
    content = video_bytes(FRAMES // 4, form=form, codec=codec, pixel_format="yuv420p")
    video = load_video(content, "clip", every(6))
    assert video.frames.shape == (4, 3, 48, 64)
    found = video.frames.permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(found - FRAMES[::6] // 4).mean() < 8


def test_frames_are_resized_while_they_are_decoded():
    reading = VideoReading(WHOLE.sample, lambda frames, height, width: (24, 32))
    video = load_video(video_bytes(FRAMES), "clip", reading)
    assert torch.equal(video.frames, resize_frames(torch.from_numpy(FRAMES).permute(0, 3, 1, 2), (24, 32)))


def test_resizing_is_that_of_pillow_but_for_rounding():
    y, x = np.mgrid[:48, :64]
    smooth = np.stack([100 + 50 * np.sin(x / 9 + y / (5 + c)) for c in range(3)], -1).astype(np.uint8)
    [found] = resize_frames(torch.from_numpy(smooth).permute(2, 0, 1)[None], (28, 84)).permute(0, 2, 3, 1).int().numpy()
    expected = np.asarray(Image.fromarray(smooth).resize((84, 28), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(found - expected).max() <= 1


def test_the_sound_of_a_video_is_heard():
    wave = tone(440, 2, 16_000)[:, 0] / 2
    content = video_bytes(FRAMES[:16], clip=wave)
    reading = VideoReading(WHOLE.sample, WHOLE.size, audio_rate=8_000)
    video = load_video(content, "clip", reading)
    assert video.audio.rate == 8_000
    assert abs(len(video.audio.samples) - 16_000) <= 1
    expected = tone(440, 2, 8_000)[:, 0] / 2
    assert np.abs(video.audio.samples[500:15_000] - expected[500:15_000]).max() < 2e-3
    assert len(video.frames) == 16
    assert load_video(content, "clip", WHOLE).audio is None
    assert load_video(video_bytes(FRAMES), "clip", reading).audio is None


ROTATIONS = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}  # clockwise, as a track's header has it


@pytest.mark.parametrize("degrees", ROTATIONS)
def test_frames_are_turned_as_the_telephone_was_held(degrees):
    frames = moving(3, 32, 48) // 4
    content = bytearray(video_bytes(frames, form="mp4", codec="libx264", pixel_format="yuv444p"))
    a, b, c, d = (value << 16 for value in ROTATIONS[degrees])
    start = content.index(b"tkhd") + 44
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    video = load_video(bytes(content), "clip", WHOLE)
    expected = np.rot90(frames, -degrees // 90, axes=(1, 2))
    assert video.frames.shape[-2:] == expected.shape[1:3]
    assert np.abs(video.frames.permute(0, 2, 3, 1).numpy().astype(int) - expected).mean() < 8


GOOD = video_bytes(FRAMES, form="mp4", codec="libx264", pixel_format="yuv420p")
STREAMABLE = video_bytes(
    moving(24, 96, 128), form="mp4", codec="libx264", pixel_format="yuv420p", options={"movflags": "faststart"}
)
ONLY_SOUND = video_bytes(FRAMES[:1], clip=tone(440, 1, 16_000)[:, 0])
BAD = {
    "text": (b"no video at all", "no video that can be read"),
    "HTML": (b"<!DOCTYPE html><html></html>", "no video that can be read"),
    "an mp4 without its index": (GOOD[: len(GOOD) // 2], "no video that can be read"),
    "an mp4 cut short after its index": (STREAMABLE[: len(STREAMABLE) * 2 // 3],
                                         r"ends after \d+ of 24 frames|no video that can be read|is damaged"),
    "a matroska file cut short": (video_bytes(moving(60))[:60_000], r"ends after \d+ of 60 frames|ends at second"),
    "a playlist of other files": (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
                                  "no video that can be read"),
    "a list of files to concatenate": (b"ffconcat version 1.0\nfile /etc/hostname\n", "no video that can be read"),
    "too long": (video_bytes(moving(30), fps=1), "30.0 seconds, more than 20"),
    "too large": (video_bytes(moving(2, 400, 600)), "600 x 400 is 240000 pixels, more than 100000"),
    "too wide": (video_bytes(moving(2, 4, 900)), "aspect ratio"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_videos_are_named(case):
    content, message = BAD[case]
    limits = MediaLimits(max_seconds=20, max_pixels=100_000)
    with pytest.raises(MediaError, match=f"clip.mp4: .*({message})"):
        load_video(content, "clip.mp4", WHOLE, limits)


def test_a_list_of_files_opens_none_of_them(tmp_path, monkeypatch):
    (tmp_path / "x.ts").write_bytes(video_bytes(FRAMES, form="mpegts", codec="libx264", pixel_format="yuv420p"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MediaError, match="no video that can be read"):
        load_video(b"ffconcat version 1.0\nfile x.ts\n", "clip", WHOLE)


def test_a_sound_alone_is_no_video():
    from tests.data.multimodal.files import sound_bytes

    content = sound_bytes(tone(440, 1, 16_000), form="OGG", subtype="VORBIS")
    with pytest.raises(MediaError, match="no images in it"):
        load_video(content, "clip", WHOLE)


def test_damage_within_a_video_is_found():
    content = bytearray(STREAMABLE)
    start = content.index(b"mdat") + 2_000
    content[start : start + 400] = bytes(400)
    with pytest.raises(MediaError, match=r"clip: .*(damaged|decoded|read)"):
        load_video(bytes(content), "clip", WHOLE)


# ---------------------------------------------------------------- rules of transformers


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 7, 8, 30, 99, 250, 2000])
@pytest.mark.parametrize("fps", [1.0, 7.5, 24.0, 29.97])
def test_frames_are_chosen_as_transformers_does(total, fps):
    from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    metadata = SimpleNamespace(total_num_frames=total, fps=fps, duration=total / fps)
    this = SimpleNamespace(fps=2, min_frames=4, max_frames=64, max_duration=60)
    found = between_ends(total, fps, wanted_fps=2, min_frames=4, max_frames=64)
    assert found == Qwen3VLVideoProcessor.sample_frames(this, metadata).tolist()
    found = at_seconds(total, fps, wanted_fps=2, max_seconds=60)
    assert found == Glm4vVideoProcessor.sample_frames(this, metadata).tolist()


def test_frames_at_even_distances():
    found = evenly_by_rate(100, 25.0, wanted_fps=2, min_frames=4, max_frames=64, multiple=2)
    assert found == [0, 12, 25, 37, 50, 62, 75, 87]
    assert evenly_by_rate(1, 25.0, wanted_fps=2, min_frames=4, max_frames=64, multiple=2) == [0]
    assert evenly_by_rate(3, 25.0, wanted_fps=2, min_frames=4, max_frames=64, multiple=2) == [0, 1]
    assert len(evenly_by_rate(5000, 25.0, wanted_fps=9, min_frames=4, max_frames=64, multiple=2)) == 64
    assert from_middles(100, count=4) == [12, 37, 62, 87]
    assert from_middles(3, count=4) == [0, 1, 2]


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_patches_are_those_of_transformers(frames):
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    pixels = torch.from_numpy(moving(frames, 16, 24)).permute(0, 3, 1, 2)
    normal = Normalization.of_frames([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])(pixels.flatten(2)[:, :, None]).view(pixels.shape)
    exact = (pixels.double() / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(
        3, 1, 1
    )
    assert torch.allclose(normal.double(), exact, atol=1e-6)
    expected, *grid = Qwen3VLVideoProcessor.patchify(None, normal[None], 4, 2, 2)
    patches, sizes = patchify(normal, patch=4, merge=2, frames_per_patch=2)
    assert torch.equal(patches.flatten(1), expected[0])
    assert sizes.tolist() == [grid]


def test_an_image_is_a_video_of_one_frame():
    family = family_for("qwen2_vl")
    processor = family.image_processor
    processor.do_resize = False
    image = Image.fromarray(FRAMES[0])
    made = family.image(image).tensors["pixel_values"].normalized()
    frames = torch.from_numpy(FRAMES[:1]).permute(0, 3, 1, 2)
    patches, _ = patchify(frames, patch=4, merge=2, frames_per_patch=2)
    normalized = Normalization.of_frames(processor.image_mean, processor.image_std)(patches)
    assert torch.allclose(normalized.flatten(1), made, atol=1e-6)


class VideoProcessor:
    """Stands for transformers', which want torchvision: the patches are given, the rest is theirs."""

    merge_size = temporal_patch_size = 2

    def __init__(self, sample, family):
        from transformers.video_utils import VideoMetadata

        self.grid, self.sample = sample.get("video_grid_thw"), sample
        indices = family.sample_frames(24, 8.0)
        self.metadata = VideoMetadata(total_num_frames=24, fps=8.0, frames_indices=indices, duration=3.0)

    def __call__(self, videos, **options):
        made = {"video_grid_thw": self.grid, "video_metadata": [self.metadata]}
        if self.grid is None:
            return {"pixel_values_videos": self.sample["pixel_values"][None]}
        return {**made, "pixel_values_videos": self.sample["pixel_values_videos"]}


@pytest.mark.parametrize("name", VIDEOS)
def test_inputs_equal_those_of_transformers(name):
    transform = transform_for(name) if name == "internvl" else transform_for(name, video_fps=2, video_max_pixels=30_000)
    sample = transform(Document({"messages": SEEN, "videos": [video_bytes(FRAMES)]}, "a"))
    processor = oracle(name, transform.family, VideoProcessor(sample, transform.family))
    text = tokenizer_of(name).apply_chat_template(SEEN, chat_template=transform.chat_template, tokenize=False)
    options = {"fps": 2.0} if "omni" in name else {}
    expected = processor(text=[text], videos=[FRAMES], add_special_tokens=False, return_tensors="pt", **options)
    assert sample["input_ids"].tolist() == expected["input_ids"][0].tolist()
    for key in ("second_per_grid_ts", "video_second_per_grid"):
        assert (key in sample) == (key in expected)
        if key in sample:
            assert sample[key].tolist() == pytest.approx(torch.as_tensor(expected[key]).tolist())
    if "mm_token_type_ids" in sample:
        assert sample["mm_token_type_ids"].tolist() == expected["mm_token_type_ids"][0].tolist()
        assert 2 in sample["mm_token_type_ids"]
    assert torch.equal(sample["pixel_values" if name == "internvl" else "pixel_values_videos"],
                       expected["pixel_values" if name == "internvl" else "pixel_values_videos"])  # fmt: skip
    if name != "internvl":
        assert len(sample["pixel_values_videos"]) == sample["video_grid_thw"].prod()


@pytest.mark.parametrize("name", [name for name in VIDEOS if "omni" in name])
@pytest.mark.parametrize("seconds", [0.5, 2.7, 5.0])
def test_video_and_sound_take_turns_as_in_transformers(name, seconds):
    transform = transform_for(name, use_audio_in_video=True)
    wave = tone(440, seconds, 16_000)[:, 0] / 2
    sample = transform(Document({"messages": SEEN, "videos": [video_bytes(FRAMES, clip=wave)]}, "a"))
    processor = oracle(name, transform.family, VideoProcessor(sample, transform.family))
    if not hasattr(processor, "replace_video_with_audio_token"):
        pytest.skip("transformers before 5.20 builds the text of all videos at once")
    video = {
        "video_grid_thw": sample["video_grid_thw"],
        "video_second_per_grid": sample["video_second_per_grid"].tolist(),
    }
    pad = tokenizer_of(name).convert_tokens_to_ids(transform.family.placeholders["audio"])
    clips = int((sample["input_ids"] == pad).sum())
    expected = processor.replace_video_with_audio_token(
        video, 0, {"num_audio_tokens": [clips]}, 0, seconds_per_chunk=2.0,
        position_id_per_seconds=transform.family.positions_per_second,
    )  # fmt: skip
    assert expected in tokenizer_of(name).decode(sample["input_ids"])
    assert clips == transform.family.audio_tokens(int(sample["feature_attention_mask"].sum()))


def test_images_and_videos_keep_their_order_in_internvl():
    transform = transform_for("internvl", video_max_frames=3)
    content = "<video>and<image>and<video>"
    image = Image.fromarray(FRAMES[0]).resize((16, 16))
    record = {"messages": [{"role": "user", "content": content}, SEEN[1]], "images": [image_bytes(image)],
              "videos": [video_bytes(FRAMES[:9]), video_bytes(FRAMES[9:])]}  # fmt: skip
    found = transform(Document(record, "a"))["pixel_values"]
    assert len(found) == 3 + 1 + 3
    assert torch.allclose(found[3], transform.family.image(image).tensors["pixel_values"].normalized()[0])


@pytest.mark.parametrize(("name", "cap"), [("qwen2_vl", 20_000), ("qwen3_vl", 60_000), ("glm4v", 60_000)])
def test_pixels_of_videos_are_bounded(name, cap):
    transform = transform_for(name, video_max_pixels=cap, video_fps=2)
    sample = transform(Document({"messages": SEEN, "videos": [video_bytes(moving(24, 200, 300))]}, "a"))
    time, height, width = sample["video_grid_thw"][0].tolist()
    pixels = height * width * 16 * (1 if name == "qwen2_vl" else 2 * time)
    assert 0.4 * cap < pixels <= cap


def test_frames_are_bounded():
    transform = transform_for("qwen2_5_vl", video_max_frames=4, video_fps=8)
    sample = transform(Document({"messages": SEEN, "videos": [video_bytes(FRAMES)]}, "a"))
    assert sample["video_grid_thw"][0, 0] == 2
    assert sample["second_per_grid_ts"].tolist() == pytest.approx([2 / (4 / 3)])


def test_images_are_no_videos_and_the_reverse():
    transform = transform_for("qwen2_vl")
    with pytest.raises(DataError, match=r"a, message 1: 3 bytes: .*no image"):
        transform(Document({"messages": [{"role": "user", "content": "<image>"}, SEEN[1]], "images": [b"abc"]}, "a"))
    with pytest.raises(DataError, match="llava has no place for video"):
        transform_for("llava")(Document({"messages": SEEN, "videos": [video_bytes(FRAMES[:2])]}, "a"))
