"""``veomni data preview``: what is printed, and the picture."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests.config.samples import write
from tests.data.multimodal.small_model import save_media, save_model
from veomni.cli import main
from veomni.errors import EXIT_BAD_INPUT

RECORDS = [
    {"messages": [{"role": "user", "content": "<image>QUESTION?"}, {"role": "assistant", "content": "ANSWER"}],
     "images": ["photo.jpg"]},
    {"messages": [{"role": "user", "content": [{"type": "video", "video": "clip.mp4"}]},
                  {"role": "assistant", "content": "some words"}]},
    {"messages": [{"role": "user", "content": "<audio><image>"}, {"role": "assistant", "content": "it"}],
     "audios": ["tone.wav"], "images": ["chart.png"]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 900}]},
]  # fmt: skip


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    save_media(tmp_path / "media")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    changes = {
        "model.config_path": None, "model.train_tokenizer_vocab_size": None, "model.model_path": "model",
        "data.train_path": "train.jsonl", "data.data_type": "multimodal", "data.media.root": "media",
        "data.media.image_max_pixels": 5000, "data.media.video_max_pixels": 5000, "data.max_seq_len": 900,
        "data.cache_dir": "cache",
    }  # fmt: skip
    return str(write(tmp_path / "a.yaml", changes))


def preview(capsys, *arguments):
    main(["data", "preview", *arguments])
    return capsys.readouterr().out


def test_media_are_measured_and_what_stands_for_them_is_counted(config, capsys, tmp_path):
    printed = preview(capsys, config, "--rows", "3")
    assert "train.jsonl, line 1" in printed
    assert "image 1: 160 x 120 pixels -> 70 tokens, patches 20 wide x 14 high, pixel_values [280, 96]" in printed
    assert "<|IMAGE|> x 70\n" in printed.replace("<|vision_eos|>", "\n")
    assert "video 1: 4 of 16 frames at 8 per second, to " in printed
    assert "audio 1: 1.20 s of audio -> 30 tokens, input_features [1, 8, 120]" in printed
    assert "<|AUDIO|> x 30" in printed
    assert "QUESTION?" in printed
    assert "of 4 documents" in printed
    assert "1 longer than 900" in printed
    assert "media: 1 x audio, 2 x image, 1 x video; " in printed
    assert "% filled" in printed
    assert "lengths: out/data_lengths.png" in printed
    picture = Image.open(tmp_path / "out/data_lengths.png")
    assert picture.size == (1080, 540)
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_only_answers_are_green(config, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    printed = preview(capsys, config, "--rows", "1")
    green = "".join(part.split("\x1b[0m")[0] for part in printed.split("\x1b[32m")[1:])
    assert green.startswith("ANSWER<|im_end|>")
    assert "QUESTION" not in green


def test_weights_change_no_colour(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    changes = {
        "data.train_path": str(tmp_path / "t.jsonl"), "train.output_dir": str(tmp_path / "out"),
        "data.cache_dir": str(tmp_path / "cache"), "data.max_seq_len": 64, "data.data_type": "conversation",
    }  # fmt: skip
    config, printed = str(write(tmp_path / "a.yaml", changes)), []
    for weights in ((1, 1), (0.5, 3)):
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}] * 2
        messages = [turns[0], {**turns[1], "weight": weights[0]}, turns[2], {**turns[3], "weight": weights[1]}]
        (tmp_path / "t.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        printed.append(preview(capsys, config, "--rows", "1"))
    assert printed[0].count("\x1b[32m") == 2
    assert printed[0] == printed[1]


def test_audio_in_video_is_heard(config, capsys):
    printed = preview(capsys, config, "--rows", "2", "--data.media.use_audio_in_video", "true")
    assert "with 2.00 s of audio" in printed


def test_a_cache_gives_the_same(config, capsys, tmp_path):
    first = preview(capsys, config, "--data.media.cache_gib", "0.1")
    kept = list((tmp_path / "cache/media").rglob("*.safetensors"))
    assert len(kept) == 4
    assert preview(capsys, config, "--data.media.cache_gib", "0.1") == first


def test_bad_media_end_it_or_are_left_out(config, capsys, tmp_path):
    (tmp_path / "media/photo.jpg").write_text("<html>")
    with pytest.raises(SystemExit) as caught:
        main(["data", "preview", config])
    assert caught.value.code == EXIT_BAD_INPUT
    assert "train.jsonl, line 1, message 1: photo.jpg: an HTML page, no image" in capsys.readouterr().err
    printed = preview(capsys, config, "--data.media.on_bad_media", "skip")
    assert "1 left out: bad media" in printed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--data.data_type", "conversation"], "data.media.root has no meaning"),
        (["--data.media.image_max_pixel", "9"], "did you mean 'image_max_pixels'"),
        (["--data.media.video_max_frames", "0"], "data.media.video_max_frames"),
        (["--data.chat_template", "chatml"], "media, and the chat template has no place for them"),
        (["--data.chat_template", "qwen-vl"], "0 image placeholders (<|IMAGE|>), the record 1 images"),
    ],
)
def test_wrong_settings_are_named(config, changes, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["data", "preview", config, *changes])
    assert caught.value.code == EXIT_BAD_INPUT
    assert said in capsys.readouterr().err


def test_text_has_a_histogram_too(tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": "word " * (1 + n % 9)}) + "\n" for n in range(40)))
    changes = {
        "data.train_path": str(tmp_path / "t.jsonl"), "train.output_dir": str(tmp_path / "out"),
        "data.cache_dir": str(tmp_path / "cache"), "data.max_seq_len": 32,
    }  # fmt: skip
    printed = preview(
        capsys, str(write(tmp_path / "a.yaml", changes)), "--rows", "1", "--plot", str(tmp_path / "x.png")
    )
    assert "rows of 32 tokens" in printed
    assert Image.open(tmp_path / "x.png").size == (1080, 540)


def test_sources_come_in_turn_and_texts_beside_media(config, capsys, tmp_path):
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": f"plain {n}"}) + "\n" for n in range(3)))
    sources = [
        {"path": "train.jsonl", "name": "talks"}, {"path": "plain.jsonl", "name": "texts", "data_type": "plaintext"},
    ]  # fmt: skip
    given = ["--data.train_path", "null", "--data.sources", json.dumps(sources), "--train.max_steps", "1"]
    printed = preview(capsys, config, "--rows", "4", *given)
    titles = [line.strip("\u2500 ") for line in printed.splitlines() if ".jsonl, line" in line]
    assert [title.partition(":")[0] for title in titles] == ["talks", "texts", "talks", "texts"]
    assert "plain 1" in printed
    assert "image 1: 160 x 120" in printed
    assert "7 documents" in printed
