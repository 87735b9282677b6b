from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.data.multimodal.families import SOUNDS, oracle, tokenizer_of, transform_for
from tests.data.multimodal.files import sound_bytes, tone
from veomni.data.multimodal.audio_clip import AudioClip, load_audio
from veomni.data.multimodal.limits import MediaLimits
from veomni.data.multimodal.processors import build_family
from veomni.data.sources.records import Document
from veomni.errors import DataError, MediaError

RATE = 16_000


@pytest.mark.parametrize(
    "form", [("WAV", "FLOAT"), ("WAV", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("MP3", None)]
)
def test_formats_are_read(form):
    wave = tone(440, 0.5, RATE)
    clip = load_audio(sound_bytes(wave / 2, RATE, *form), "file", RATE)
    assert clip.samples.dtype == np.float32
    tolerance = {"FLOAT": 0, "PCM_16": 1e-4, "PCM_24": 1e-6}.get(form[1], 0.05)
    assert np.abs(clip.samples[2000:6000] - wave[2000:6000, 0] / 2).max() <= tolerance


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_the_wave(rate):
    clip = load_audio(sound_bytes(tone(440, 1, rate), rate), "file", RATE)
    assert abs(len(clip.samples) - RATE) <= 1
    inner = slice(1000, -1000)
    assert np.abs(clip.samples[:RATE][inner] - tone(440, 1, RATE)[: len(clip.samples), 0][inner]).max() < 1e-3


def test_what_cannot_be_heard_after_resampling_is_gone():
    clip = load_audio(sound_bytes(tone(11_000, 1, 44_100), 44_100), "file", RATE)
    assert np.abs(clip.samples[1000:-1000]).max() < 1e-3


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_channels_are_averaged(channels):
    wave = tone(300, 0.2, RATE, channels)
    clip = load_audio(sound_bytes(wave, RATE), "file", RATE)
    assert np.allclose(clip.samples, wave.mean(1), atol=1e-6)


def test_silence_is_taken_and_said(caplog, monkeypatch):
    monkeypatch.setattr("veomni.logging.warned_once", set())
    clip = load_audio(sound_bytes(np.zeros((4000, 1), np.float32)), "file", RATE)
    assert not clip.samples.any()
    assert "silent" in caplog.text


NOT_FINITE = tone(300, 0.1, RATE)
NOT_FINITE[7] = np.nan
BAD = {
    "text": (b"RIFF but no more", "no audio that can be read"),
    "HTML": (b"<html></html>", "no audio that can be read"),
    "no samples": (sound_bytes(np.zeros((0, 1), np.float32)), "an audio clip without samples"),
    "not finite": (sound_bytes(NOT_FINITE), "samples that are not finite"),
    "too long": (sound_bytes(tone(300, 3, 1000), 1000), "3.0 seconds, more than 2"),
    "FLAC cut short": (sound_bytes(np.random.default_rng(0).normal(size=(9000, 1)) / 9, RATE, "FLAC", "PCM_16")[:9000],
                       "no audio that can be read|ends after"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_sounds_are_named(case):
    content, message = BAD[case]
    with pytest.raises(MediaError, match=f"song.wav: .*({message})"):
        load_audio(content, "song.wav", RATE, MediaLimits(max_seconds=2))


HEARD = [
    {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "what?"}, {"type": "audio"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "some words"}]},
]
WAVES = [tone(440, 0.4, RATE)[:, 0], tone(700, 0.9, RATE)[:, 0]]


@pytest.mark.parametrize("name", SOUNDS)
def test_inputs_equal_those_of_transformers(name):
    transform = transform_for(name)
    sample = transform(Document({"messages": HEARD, "audios": [sound_bytes(wave) for wave in WAVES]}, "a"))
    text = tokenizer_of(name).apply_chat_template(HEARD, chat_template=transform.chat_template, tokenize=False)
    processor = oracle(name, transform.family)
    expected = processor(text=[text], audio=WAVES, return_tensors="pt")
    assert sample["input_ids"].tolist() == expected["input_ids"][0].tolist()
    audio = sample["feature_attention_mask"].bool()
    assert audio.shape[1] == (100 if name == "qwen2_audio" else 90)
    assert audio.sum(1).tolist() == expected["feature_attention_mask"].sum(1).tolist() == [40, 90]
    for number, wave in enumerate(WAVES):  # by itself: Qwen3-Omni's last frames see what a batch is padded with
        alone = processor.feature_extractor(
            wave, sampling_rate=RATE, return_tensors="pt", padding=True if "qwen3" in name else "max_length"
        )["input_features"][0]
        found = sample["input_features"][number][:, audio[number]]
        assert torch.allclose(found, alone[:, : found.shape[1]], atol=1e-5)


@pytest.mark.parametrize("name", SOUNDS)
def test_decoded_sounds_are_taken_as_they_are(name):
    transform = transform_for(name)
    messages = [{"role": "user", "content": "<audio>"}, HEARD[1]]
    decoded = {"array": WAVES[0].astype(np.float64), "sampling_rate": RATE, "path": None}
    first, second = (
        transform(Document({"messages": messages, "audios": [audio]}, "a"))
        for audio in (sound_bytes(WAVES[0]), decoded)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_openai_messages_hold_sounds_as_base64():
    import base64

    part = {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(sound_bytes(WAVES[0])).decode(), "format": "wav"},
    }
    sample = transform_for("qwen2_audio")(Document({"messages": [{"role": "user", "content": [part]}, HEARD[1]]}, "a"))
    assert sample["input_features"].shape == (1, 8, 100)


@pytest.mark.parametrize(
    ("name", "seconds", "message"),
    [("qwen2_audio", 1.1, "1.1 seconds of audio, and the model takes 1"), ("qwen2_audio", 0.001, "1.0 ms of audio"),
     ("qwen2_5_omni_thinker", 0.001, "too short"), ("qwen2_vl", 0.1, "no place for audio")],
)  # fmt: skip
def test_what_a_model_does_not_hear_is_rejected(name, seconds, message):
    transform = transform_for(name)
    document = Document({"messages": [{"role": "user", "content": "<audio>"}, HEARD[1]],
                         "audios": [sound_bytes(tone(440, seconds, RATE))]}, "train, line 7")  # fmt: skip
    with pytest.raises(DataError, match=f"train, line 7.*({message})"):
        transform(document)


def test_sounds_fit_a_tower_of_any_length():
    transform = transform_for("qwen2_audio")
    config = transform.family.config
    config.audio_config.max_source_positions = 40
    family = build_family(config, transform.tokenizer)
    made = family.audio(AudioClip(WAVES[0], RATE))
    assert made.tensors["input_features"].shape == (1, 8, 80)


@pytest.mark.parametrize("name", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_sounds_of_any_length_have_as_many_tokens_as_features(name):
    from importlib import import_module

    folder = name.removesuffix("_thinker")
    module = import_module(f"transformers.models.{folder}.modeling_{folder}")
    family = transform_for(name).family
    frames = torch.arange(1, 1001)
    if name == "qwen2_5_omni_thinker":
        expected = ((frames - 1) // 2 + 1 - 2) // 2 + 1
    else:
        expected = module._get_feat_extract_output_lengths(frames)
    assert [family.audio_tokens(count) for count in frames.tolist()] == expected.tolist()
