"""Media that are unusual but good are read; workers count together what they skip."""

from __future__ import annotations

import base64
import multiprocessing
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.bad_inputs.content import GOOD, NOISE
from tests.bad_inputs.ways import record_of
from tests.data.multimodal.families import transform_for
from tests.data.multimodal.files import image_bytes, moving, pixels, png, sound_bytes, tone, video_bytes
from veomni.data.multimodal.reader import MediaReader
from veomni.data.multimodal.samples import SkipBadMedia
from veomni.data.sources.records import Document

OMNI = "qwen2_5_omni_thinker"
WAV = sound_bytes(tone(300, 0.5, 16_000), 16_000, "WAV", "PCM_16")


def image(content):
    return record_of({"image": content})


def video(content):
    return record_of({"video": content})


def audio(content):
    return record_of({"audio": content})


def ask(content):
    return record_of({"ask": content})


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return MediaReader(tmp_path_factory.mktemp("root"))


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
