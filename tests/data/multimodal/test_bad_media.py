"""Records as they should not be: each with what is said, and whether ``on_bad_media: skip`` leaves it out."""

from __future__ import annotations

import base64
import multiprocessing
import os
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data.multimodal.families import transform_for
from tests.data.multimodal.files import bomb, image_bytes, moving, pixels, png, sound_bytes, tone, video_bytes
from veomni.data.multimodal.limits import MediaLimits
from veomni.data.multimodal.reader import MediaReader
from veomni.data.multimodal.skipping import SkipBadMedia
from veomni.data.sources.records import Document
from veomni.errors import DataError, MediaError

NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8))
GOOD = image_bytes(Image.fromarray(pixels()))
ANSWER = {"role": "assistant", "content": "some words"}
H264 = {"form": "mp4", "codec": "libx264", "pixel_format": "yuv420p"}
VIDEO = video_bytes(moving(12, 96, 96), options={"movflags": "faststart"}, **H264)
WAV, AIFF = (sound_bytes(tone(300, 0.5, 16_000), 16_000, form, "PCM_16") for form in ("WAV", "AIFF"))
MP3 = sound_bytes(tone(300, 2, 16_000), 16_000, "MP3", "MPEG_LAYER_III")
EMPTY_ROW = zlib.compress(b"\0" * 3)


def ask(content, **fields):
    return {"messages": [{"role": "user", "content": content}, ANSWER], **fields}


def image(content):
    return ask("<image>what?", images=[content])


def video(content):
    return ask("<video>what?", videos=[content])


def audio(content):
    return ask("<audio>what?", audios=[content])


def part(**fields):
    return ask([fields, {"type": "text", "text": "what?"}])


OMNI = "qwen2_5_omni_thinker"
# Record, model, what is said. These are bad media: an error, or skipped and counted.
MEDIA = {
    "an HTML page named .jpg": (image("page.jpg"), "qwen2_vl", "page.jpg: an HTML page, no image"),
    "an empty file": (image("empty.jpg"), "qwen2_vl", "empty.jpg: the file is empty"),
    "a missing file": (image("gone.jpg"), "qwen2_vl", "gone.jpg: No such file"),
    "a directory": (image("folder"), "qwen2_vl", "folder: not a regular file"),
    "a path above the root": (image("../outside.png"), "qwen2_vl", "outside.png: outside"),
    "a path from the root of the disk": (image("/etc/hostname"), "qwen2_vl", "/etc/hostname: outside"),
    "a link out of the root": (image("link.png"), "qwen2_vl", "link.png: outside"),
    "a file URL": (image("file:///etc/passwd"), "qwen2_vl", "file URLs are not read"),
    "a link-local address": (image("http://169.254.169.254/latest"), "qwen2_vl", "URLs are not allowed"),
    "an object store": (image("s3://bucket/a.png"), "qwen2_vl", "URLs are not allowed"),
    "base64 that is none": (image({"base64": "####"}), "qwen2_vl", "not base64"),
    "a data URL without base64": (image("data:image/png,xyz"), "qwen2_vl", "a data URL that is not base64"),
    "an object without media": (image({"width": 3}), "qwen2_vl", r"an object without media \(keys: width"),
    "a number": (image(3), "qwen2_vl", "int is no reference to media"),
    "nothing": (image(None), "qwen2_vl", "NoneType is no reference"),
    "a truncated JPEG": (image(image_bytes(NOISE, "JPEG")[:2500]), "qwen2_vl", "the JPEG is damaged"),
    "a truncated PNG": (image(image_bytes(NOISE)[:5000]), "llava", "the PNG is damaged"),
    "a truncated WebP": (image(image_bytes(NOISE, "WEBP")[:400]), "gemma3", "damaged"),
    "a truncated GIF": (image(image_bytes(NOISE, "GIF")[:2000]), "internvl", "damaged|no image"),
    "12 KB that decode to 100 megapixels": (image(bomb()), "qwen2_vl", "100000000 pixels, more than"),
    "a header of 60000 x 60000": (image(png(60_000, 60_000)), "qwen2_vl", "more than|exceeds"),
    "0 x 0": (image(png(0, 0, data=EMPTY_ROW)), "qwen2_vl", "no image|0 x 0|damaged"),
    "1 x 10000": (image(image_bytes(Image.new("L", (1, 10_000)))), "qwen3_vl", "aspect ratio of 10000"),
    "10000 x 1": (image(image_bytes(Image.new("L", (10_000, 1)))), "glm4v", "aspect ratio of 10000"),
    "32-bit floats": (image(image_bytes(Image.new("F", (9, 9)), "TIFF")), "qwen2_vl", "no known range"),
    "an audio clip as image": (image(sound_bytes(tone(300, 0.1, 8000))), "qwen2_vl", "no image"),
    "a file too large": (image(image_bytes(NOISE) + b"\0" * 3_000_000), "qwen2_vl", "bytes, more than 3000000"),
    "an image as video": (video(b"no video"), "qwen2_vl", "no video that can be read"),
    "a truncated mp4": (video(VIDEO[: len(VIDEO) // 2]), "qwen2_vl", "ends after|can be read|damaged"),
    "an mp4 without its index": (video(video_bytes(moving(9), **H264)[:3000]), "qwen3_vl", "can be read|no images"),
    "a playlist": (video(b"#EXTM3U\n#EXTINF:9,\n/etc/hostname\n"), "qwen2_vl", "no video that can be read"),
    "a video too long": (video(video_bytes(moving(20, 16, 16), fps=1)), "glm4v", "20.0 seconds, more than 15"),
    "an audio clip too long": (audio(sound_bytes(tone(9, 16, 100), 100)), OMNI, "16.0 seconds, more than 15"),
    "an audio clip longer than the model hears": (
        audio(sound_bytes(tone(300, 1.2, 16_000))), "qwen2_audio", "1.2 seconds of audio, and the model takes 1"),
    "an audio clip of a millisecond": (audio(sound_bytes(tone(300, 0.001, 16_000))), "qwen2_audio", "too short"),
    "an audio clip without samples": (audio(sound_bytes(np.zeros((0, 2), np.float32))), OMNI, "without samples"),
    "an audio clip that is not finite": (audio(sound_bytes(np.full((900, 1), np.inf, np.float32))), OMNI, "not finite"),
    "a WAV cut short": (audio(WAV[: len(WAV) // 2]), OMNI, r"ends after \d+ of \d+ bytes"),
    "an AIFF cut short": (audio(AIFF[:-900]), OMNI, r"ends after \d+ of \d+ bytes"),
    "an MP3 cut short": (audio(MP3[: len(MP3) // 2]), OMNI, r"ends after \d+ of \d+ samples"),
    "HTML as video": (video("page.jpg"), "qwen2_vl", "no video that can be read"),
    "an audio clip as video": (video(WAV), "qwen2_vl", "no images|no video that can be read"),
    "a JPEG whose header alone is whole": (image(image_bytes(NOISE, "JPEG")[:-600]), "qwen3_vl", "JPEG is damaged"),
    "HTML as audio clip": (audio("page.jpg"), OMNI, "no audio that can be read"),
}  # fmt: skip

# These are malformed conversations: an error under any policy.
CONVERSATIONS = {
    "more marks than images": (ask("<image> and <image>", images=[GOOD]), "qwen2_vl", "one more image than the field"),
    "a mark without a field": (ask("<video>"), "qwen2_vl", "one more video than the field 'videos' holds"),
    "more images than marks": (ask("<image>", images=[GOOD] * 2), "llava", "2 images, and the .* have a place for 1"),
    "images without a mark": (ask("what?", images=[GOOD]), "gemma3", "1 images, and the messages have a place for 0"),
    "audio clips without a mark": (ask("what?", audios=[GOOD]), OMNI, "1 audios, and the messages"),
    "a placeholder in the text": (ask("<image> <|image_pad|>", images=[GOOD]), "qwen2_vl",
                                  "2 image placeholders .*, the record 1 images"),
    "a placeholder alone": (ask("what is <|video_pad|>?"), "qwen3_vl", "1 video placeholders .*, the record 0 videos"),
    "a field that is no list": (ask("<image>", images="a.png"), "qwen2_vl", "field 'images' is no list"),
    "a part of unknown type": (part(type="smell", smell="x"), "qwen2_vl", "a part of unknown type 'smell'"),
    "a part without type": (part(image="x"), "qwen2_vl", "a part of the content has no type"),
    "a part that is a string": (ask(["what?"]), "qwen2_vl", "a part of the content has no type"),
    "text without text": (part(type="text"), "qwen2_vl", "a part of type text without text"),
    "an empty list of parts": (ask([]), "qwen2_vl", "the content is an empty list"),
    "a template without a place": (ask("<video>", videos=[VIDEO]), "llava", "llava has no place for video"),
    "roles out of order": ({"messages": [ANSWER, ANSWER]}, "qwen2_vl", "message 1: role 'assistant' cannot come first"),
    "an unknown role": ({"messages": [{"role": "gpt", "content": "x"}]}, "qwen2_vl", "unknown role 'gpt'"),
    "nobody answers": ({"messages": [{"role": "user", "content": "x"}]}, "qwen2_vl", "no message is the assistant's"),
    "messages that are no list": ({"messages": "x"}, "qwen2_vl", "'messages' is not a list"),
    "no messages": ({"text": "x"}, "qwen2_vl", "no field 'messages'"),
    "a message that is none": ({"messages": ["x"]}, "qwen2_vl", "message 1: not an object"),
    "an answer of weight 0": ({"messages": [{"role": "user", "content": "x"}, {**ANSWER, "weight": 0}]}, "qwen2_vl",
                              "leaves no supervised token"),
}  # fmt: skip


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    root = tmp_path_factory.mktemp("root") / "media"
    (root / "folder").mkdir(parents=True)
    (root / "page.jpg").write_bytes(b"\n<!DOCTYPE html>\n<html><body>Not found</body></html>")
    (root / "empty.jpg").touch()
    (root.parent / "outside.png").write_bytes(GOOD)
    os.symlink(root.parent / "outside.png", root / "link.png")
    return MediaReader(root, limits=MediaLimits(max_bytes=3_000_000, max_seconds=15))


@pytest.mark.parametrize("case", MEDIA)
def test_bad_media_are_named(case, reader):
    record, name, message = MEDIA[case]
    transform = transform_for(name, reader)
    with pytest.raises(MediaError, match=f"^train.jsonl, line 12, message 1: .*({message})") as raised:
        transform(Document(record, "train.jsonl, line 12"))
    assert raised.value.fix


@pytest.mark.parametrize("case", MEDIA)
def test_bad_media_are_skipped_and_counted(case, reader, caplog):
    record, name, message = MEDIA[case]
    transform, skipping = transform_for(name, reader), SkipBadMedia(max_skipped=1)
    assert skipping(transform, Document(record, "train.jsonl, line 12")) is None
    assert skipping.skipped == 1
    assert "left out record 1 of at most 1: train.jsonl, line 12, message 1: " in caplog.text
    with pytest.raises(DataError, match=f"2 records have media that cannot be used, the last one: .*({message})"):
        skipping(transform, Document(record, "train.jsonl, line 12"))


@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_bad_conversations_are_named(case, policy, reader):
    record, name, message = CONVERSATIONS[case]
    transform, document = transform_for(name, reader), Document(record, "train.jsonl, line 12")
    with pytest.raises(DataError, match=f"^train.jsonl, line 12.*({message})") as raised:
        transform(document) if policy == "error" else SkipBadMedia(9)(transform, document)
    assert raised.value.fix
    assert not isinstance(raised.value, MediaError)


UNUSUAL = {
    "CMYK": image(image_bytes(Image.fromarray(pixels()).convert("CMYK"), "JPEG")),
    "16-bit grey": image(image_bytes(Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70))),
    "16-bit colour": image(png(2, 2, bits=16, colour=2, data=zlib.compress(2 * (b"\0" + bytes(range(12)))))),
    "a palette with a transparent colour": image(image_bytes(NOISE.quantize(8), transparency=0)),
    "a WAV whose writer did not know its length": audio(WAV[:4] + b"\xff" * 4 + WAV[8:]),
    "animated": image(image_bytes(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(90)])),
    "1 x 1": image(image_bytes(Image.new("RGB", (1, 1)))),
    "a data URL": image("data:image/png;base64," + base64.b64encode(GOOD).decode()),
    "a video of one frame": video(video_bytes(moving(1))),
    "silence": audio(sound_bytes(np.zeros((8000, 1), np.float32))),
    "8 channels": audio(sound_bytes(tone(300, 0.5, 44_100, 8), 44_100)),
    "a mark written as text": ask([{"type": "text", "text": "write <image> here"}]),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_media_are_taken(case, reader):
    sample = transform_for(OMNI, reader)(Document(UNUSUAL[case], "a"))
    assert (sample["labels"] != -100).any()
    assert all(bool(value.isfinite().all()) for value in sample.values())


def test_a_placeholder_of_no_model_is_text():
    sample = transform_for("qwen2_vl")(Document(ask("what is <|IMAGE|>?"), "a"))
    assert set(sample) == {"input_ids", "labels", "mm_token_type_ids"}


def _skip_three(skipping, transform):
    for number in range(3):
        skipping(transform, Document(image(number), f"line {number}"))


def test_workers_count_together(reader):
    skipping, transform = SkipBadMedia(max_skipped=7), transform_for("qwen2_vl", reader)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_skip_three, args=(skipping, transform)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert skipping.skipped == 6
