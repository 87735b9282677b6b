"""Samples of every family, packed into a row, go through a tiny model: every placeholder finds its feature."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from PIL import Image

from tests.data.multimodal.families import IMAGES, SOUNDS, SPECS, VIDEOS, tokenizer_of
from tests.data.multimodal.files import image_bytes, moving, pixels, sound_bytes, tone, video_bytes
from tests.models import multimodal
from veomni.data import CHAT_TEMPLATES
from veomni.data.multimodal import MediaSettings, MultimodalTransform, build_family
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.data.sources.records import Document
from veomni.models import Materializer, build_model
from veomni.models.adapter.passes.media import prepare_towers

ANSWER = {"role": "assistant", "content": "some words"}
PICTURES = [image_bytes(Image.fromarray(pixels(30, 40, seed=seed))) for seed in (0, 5)]
WAVES = [sound_bytes(tone(300, seconds, 16_000)) for seconds in (0.3, 0.41)]


def records(name):
    found = [{"messages": [{"role": "user", "content": "what?"}, ANSWER]}]
    if name in IMAGES:
        found.append({"messages": [{"role": "user", "content": "<image>a<image>"}, ANSWER], "images": PICTURES})
    if name in SOUNDS:
        found.append({"messages": [{"role": "user", "content": "<audio>a<audio>"}, ANSWER], "audios": WAVES})
    if name in VIDEOS:
        found.append({"messages": [{"role": "user", "content": "<video>a"}, ANSWER],
                      "videos": [video_bytes(moving(12, 32, 40))]})  # fmt: skip
    return found


def tiny(name):
    """The tiny configuration of the model tests, with the ids of this package's tokenizer."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[name](**deepcopy(multimodal.FAMILIES[name]))
    for key, token in SPECS[name]["ids"].items():
        setattr(config, key, tokenizer_of(name).convert_tokens_to_ids(token))
    text = config.get_text_config()
    text.vocab_size, text.pad_token_id, text.use_cache, config.use_cache = 400, None, False, False
    return config


def settings(name):
    if name not in multimodal.MROPE:
        return MediaSettings()
    return MediaSettings(image_min_pixels=64, image_max_pixels=1200, video_max_pixels=4000)


@pytest.mark.parametrize("name", SPECS)
def test_samples_train_a_model(name):
    config = tiny(name)
    family = build_family(config, tokenizer_of(name), None, settings(name))
    transform = MultimodalTransform(family, tokenizer_of(name), CHAT_TEMPLATES.get(SPECS[name]["template"]))
    samples = [transform(Document(record, "a")) for record in records(name)]
    model = build_model(config, attention="eager", weights="random")
    Materializer(model, device=torch.device("cpu"), seed=0)(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # some projections begin as zeros
        parameter.data += 0.15 * torch.randn(parameter.shape, generator=generator)
    prepare_towers(model)
    collate = MultimodalCollator(config, max_seq_len=sum(len(sample["input_ids"]) for sample in samples) + 5)
    batch = collate([samples])
    loss = model(**batch.inputs).loss
    loss.backward()
    assert loss.isfinite()
    towers = [
        parameter for key, parameter in model.named_parameters() if "vision" in key or "visual" in key or "audio" in key
    ]
    assert (
        sum(bool(parameter.grad.abs().sum()) for parameter in towers if parameter.grad is not None) > len(towers) // 2
    )
