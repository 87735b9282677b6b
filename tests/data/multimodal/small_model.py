"""A directory with the configuration and tokenizer of a tiny omni model, and files for it to see and hear."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.data.multimodal.families import SPECS, config_of, tokenizer_of
from tests.data.multimodal.files import image_bytes, moving, pixels, sound_bytes, tone, video_bytes
from veomni.data import CHAT_TEMPLATES

NAME = "qwen2_5_omni_thinker"


def save_model(directory: Path) -> Path:
    tokenizer = tokenizer_of(NAME)
    config_of(NAME).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATES.get(SPECS[NAME]["template"]))
    return directory


def save_media(directory: Path) -> None:
    """Write ``photo.jpg``, ``chart.png``, ``clip.mp4`` (two seconds, with audio clip) and ``tone.wav``."""
    directory.mkdir(exist_ok=True)
    (directory / "photo.jpg").write_bytes(image_bytes(Image.fromarray(pixels(120, 160)), "JPEG"))
    (directory / "chart.png").write_bytes(image_bytes(Image.fromarray(pixels(90, 60))))
    frames = moving(16, 48, 64) // 2
    clip = video_bytes(frames, form="mp4", codec="libx264", pixel_format="yuv420p", clip=tone(440, 2, 16_000)[:, 0] / 2)
    (directory / "clip.mp4").write_bytes(clip)
    (directory / "tone.wav").write_bytes(sound_bytes(tone(440, 1.2, 22_050, 2), 22_050, "WAV", "PCM_16"))
