from __future__ import annotations

import multiprocessing
import os

import pytest
import torch
from PIL import Image

from tests.data.multimodal.families import transform_for
from tests.data.multimodal.files import image_bytes, moving, pixels, sound_bytes, tone, video_bytes
from veomni.data.multimodal.family import MediaFeatures
from veomni.data.multimodal.feature_cache import FeatureCache
from veomni.data.multimodal.processors import settings_of
from veomni.data.sources.records import Document
from veomni.errors import MediaError

OMNI = "qwen2_5_omni_thinker"
ANSWER = {"role": "assistant", "content": "some words"}
RECORD = {
    "messages": [{"role": "user", "content": "<image><audio><video><image>"}, ANSWER],
    "images": [image_bytes(Image.fromarray(pixels(seed=seed))) for seed in (1, 2)],
    "audios": [sound_bytes(tone(440, 0.3, 16_000))], "videos": [video_bytes(moving(4))],
}  # fmt: skip
FEATURES = MediaFeatures(
    {"pixel_values": torch.arange(1000.0), "image_grid_thw": torch.tensor([[1, 2, 3]])}, "<x>", "y"
)


def files(cache):
    return sorted(path for path in cache.directory.rglob("*") if path.is_file())


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "media", 1 << 30, {"any": "settings"})


def test_what_is_read_back_is_what_was_made(tmp_path, monkeypatch):
    plain, cached = transform_for(OMNI), transform_for(OMNI)
    cached.media.cache = FeatureCache(tmp_path / "media", 1 << 30, settings_of(cached.family))
    expected = plain(Document(RECORD, "a"))
    first = cached(Document(RECORD, "a"))
    assert len(files(cached.media.cache)) == 4
    for kind in ("image", "video", "audio"):
        monkeypatch.setattr(cached.family, kind, None)  # nothing is made a second time
    second = cached(Document(RECORD, "a"))
    for sample in (first, second):
        assert sample.keys() == expected.keys()
        assert all(torch.equal(sample[key], expected[key]) for key in expected)


def test_pixels_are_kept_in_8_bits(tmp_path):
    transform = transform_for("qwen2_vl")
    transform.media.cache = FeatureCache(tmp_path / "media", 1 << 30, settings_of(transform.family))
    sample = transform(Document({**RECORD, "messages": [{"role": "user", "content": "<image><image>"}, ANSWER],
                                 "audios": None, "videos": None}, "a"))  # fmt: skip
    kept = sum(path.stat().st_size for path in files(transform.media.cache))
    assert sample["pixel_values"].nbytes / 9 < kept < sample["pixel_values"].nbytes / 4  # and headers


@pytest.mark.parametrize(
    ("name", "settings"),
    [("qwen2_vl", {"image_max_pixels": 9000}), ("qwen2_vl", {"video_fps": 3.0}), ("qwen2_5_vl", {}), ("llava", {}),
     (OMNI, {"use_audio_in_video": True})],
)  # fmt: skip
def test_other_settings_have_other_names(name, settings, tmp_path):
    first, second = transform_for("qwen2_vl" if name != OMNI else OMNI), transform_for(name, **settings)
    assert settings_of(first.family) != settings_of(second.family)
    names = [FeatureCache(tmp_path, 9, settings_of(made.family)).path("image", b"x") for made in (first, second)]
    assert names[0] != names[1]


def test_names_follow_kind_and_content(cache):
    assert len({cache.path(*key) for key in (("image", b"a"), ("image", b"b"), ("video", b"a"))}) == 3


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.write_text("x")]
)
def test_damaged_files_are_made_again(cache, damage, caplog):
    path = cache.path("image", b"a")
    cache.write(path, FEATURES)
    damage(path)
    assert cache.read(path) is None
    assert "is damaged" in caplog.text
    cache.write(path, FEATURES)
    assert cache.read(path).text == "<x>"


def test_bad_media_are_not_kept(tmp_path):
    transform = transform_for("qwen2_vl")
    transform.media.cache = FeatureCache(tmp_path / "media", 1 << 30, {})
    with pytest.raises(MediaError):
        transform(Document({"messages": [{"role": "user", "content": "<image>"}, ANSWER], "images": [b"x"]}, "a"))
    assert not (tmp_path / "media").exists()


def test_the_files_not_used_for_longest_go_first(tmp_path):
    cache = FeatureCache(tmp_path / "media", 10 * 4300, {})
    paths = [cache.path("image", bytes([number])) for number in range(14)]
    for number, path in enumerate(paths):
        cache.write(path, FEATURES)
        os.utime(path, ns=(number * 10**9, number * 10**9))
        if number == 8:
            assert cache.read(paths[0]) is not None  # and so it is the one used last
    size = sum(path.stat().st_size for path in files(cache))
    assert size <= cache.max_bytes
    assert paths[0].exists()
    assert not paths[1].exists()
    assert paths[13].exists()
    assert all(path.suffix == ".safetensors" for path in files(cache)), "nothing half written is left"


def _write_many(directory):
    cache = FeatureCache(directory, 5 * 4300, {})
    for number in range(40):
        path = cache.path("image", bytes([number % 8]))
        features = cache.read(path)
        assert features is None or torch.equal(features.tensors["pixel_values"], FEATURES.tensors["pixel_values"])
        cache.write(path, FEATURES)


def test_processes_may_share_it(tmp_path, caplog):
    processes = [
        multiprocessing.get_context("fork").Process(target=_write_many, args=(tmp_path / "media",)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
