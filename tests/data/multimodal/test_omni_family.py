"""Composed models: every kind of encoder gets the pixels of its processor, and a placeholder for each feature."""

from __future__ import annotations

import pytest
import torch
import transformers
from PIL import Image

from tests.data.multimodal.families import tokenizer_for
from tests.data.multimodal.files import image_bytes, pixels, sound_bytes, tone
from tests.models.layouts import materialized
from veomni.data import CHAT_TEMPLATES
from veomni.data.multimodal import MediaSettings, MultimodalTransform, build_family
from veomni.data.multimodal.collate import MultimodalCollator
from veomni.data.sources.records import Document
from veomni.errors import ConfigError, DataError, MediaError
from veomni.families.omni import ENCODERS
from veomni.models.omni.build import OmniConfig

SQUARE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 12, "patch_size": 4}  # fmt: skip
PATCHES = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
           "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 24}  # fmt: skip
IMAGES = {
    "siglip_vision_model": SQUARE,
    "clip_vision_model": SQUARE,
    "dinov2": SQUARE,
    "internvl_vision": {**SQUARE, "image_size": [12, 12], "patch_size": [4, 4]},
    "qwen2_5_vl_vision": {**PATCHES, "fullatt_block_indexes": [1], "window_size": 16},
    "qwen3_vl_vision": {**PATCHES, "num_position_embeddings": 16, "deepstack_visual_indexes": []},
}
EARS = {"model_type": "qwen2_audio_encoder", "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 50}  # fmt: skip
TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|audio_start|>", "<|audio_pad|>", "<|audio_end|>",
          "<|code_pad|>", "<|latent_pad|>")  # fmt: skip


def config_of(encoder):
    tokenizer = tokenizer_for(TOKENS)
    text = {"model_type": "qwen3", "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    return OmniConfig(
        text_config=text, audio_config=EARS, vision_config={"model_type": encoder, **IMAGES[encoder]},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        audio_token_id=tokenizer.convert_tokens_to_ids("<|audio_pad|>"),
    )  # fmt: skip


def transform_of(config, **settings):
    tokenizer = tokenizer_for(TOKENS)
    family = build_family(config, tokenizer, None, MediaSettings(**settings))
    return MultimodalTransform(family, tokenizer, CHAT_TEMPLATES.get("qwen3-omni"))


def conversation():
    picture = image_bytes(Image.fromarray(pixels(20, 36)), "PNG")
    clip = sound_bytes(tone(440, 0.4, 16_000), 16_000, "WAV", "PCM_16")
    question = {"role": "user", "content": "<image><audio>what is it?"}
    record = {"messages": [question, {"role": "assistant", "content": "a b"}], "images": [picture], "audios": [clip]}
    return Document(record, "here")


def test_every_image_encoder_is_tested():
    assert IMAGES.keys() == {name for name in ENCODERS if ENCODERS.get(name).image_processor}


@pytest.mark.parametrize("encoder", IMAGES)
def test_a_conversation_goes_through_the_model(encoder):
    config = config_of(encoder)
    if type(config.vision_config) not in transformers.MODEL_MAPPING:
        pytest.skip(f"AutoModel of transformers {transformers.__version__} does not know {encoder}")
    transform = transform_of(config)
    sample = transform(conversation())
    model = materialized(config, attention="eager").train()
    batch = MultimodalCollator(config, max_seq_len=256)([[sample, sample]])
    output = model(**batch.inputs)  # rejects placeholders that are not as many as features
    assert output.losses["text"].isfinite()
    output.loss.backward()
    for part in ("image_encoder", "image_projector", "audio_encoder", "audio_projector"):
        assert any(p.grad is not None and p.grad.any() for p in model.get_submodule(part).parameters()), part

    name = ENCODERS.get(encoder).image_processor
    size = {"height": 12, "width": 12}
    options = (
        {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2} if name.startswith("Qwen")
        else {"size": size, "crop_size": size}
    )  # fmt: skip
    processor = getattr(transformers, f"{name}Pil")(**options)
    expected = processor(images=[Image.fromarray(pixels(20, 36))], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(sample["pixel_values"], expected, rtol=0, atol=0)


def test_what_the_model_has_no_encoder_for_is_rejected():
    config = config_of("dinov2")
    config.audio_config = None
    with pytest.raises(MediaError, match="omni models take no audio"):
        transform_of(config)(conversation())
    with pytest.raises(ConfigError, match="has no such setting"):
        transform_of(config, image_max_pixels=100)


DECODERS = {"codes": {"codebook_size": 9, "channels": 4}, "latents": {"channels": 3, "width": 8}}


def generating():
    config = config_of("dinov2")
    tokenizer = tokenizer_for(TOKENS)
    config.decoders = DECODERS
    config.codes_token_id, config.latents_token_id = (
        tokenizer.convert_tokens_to_ids(token) for token in ("<|code_pad|>", "<|latent_pad|>")
    )  # fmt: skip
    family = build_family(config, tokenizer, None)
    return config, MultimodalTransform(family, tokenizer, CHAT_TEMPLATES.get("omni"))


def drawn(*parts):
    reply = [{"type": "text", "text": "here: "}, *parts]
    messages = [{"role": "user", "content": "draw"}, {"role": "assistant", "content": reply}]
    return Document({"messages": messages}, "here")


CODES, LATENTS = [0, 8, 3, 3], [[0.5, -1.0, 2.0], [0.0, 0.25, 1.5]]


def test_what_decoders_generate_comes_from_conversations():
    config, transform = generating()
    sample = transform(drawn({"type": "codes", "codes": CODES}, {"type": "latents", "latents": LATENTS},
                             {"type": "codes", "codes": [5]}))  # fmt: skip
    ids = sample["input_ids"]
    code, latent = ids == config.codes_token_id, ids == config.latents_token_id
    assert sample["codes"][code].tolist() == [*CODES, 5]
    assert (sample["codes"][~code] == -100).all()
    assert sample["latents"][latent].tolist() == LATENTS
    assert not sample["latents"][~latent].any()
    assert torch.equal(sample["latents_time"] >= 0, latent)
    assert (sample["labels"][code | latent] == -100).all()
    start = transform.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert (sample["labels"][ids == start] == start).all(), "that something is drawn is supervised as text"

    model = materialized(config, attention="eager").train()
    batch = MultimodalCollator(config, max_seq_len=96)([[sample, sample]])
    output = model(**batch.inputs)
    assert output.losses.keys() == {"text", "codes", "latents"}
    assert all(loss.isfinite() for loss in output.losses.values())
    first = int(code.nonzero()[0])
    assert batch["codes_next"][0, first - 1] == CODES[0]
    assert int((batch["codes_next"] >= 0).sum()) == 2 * 5


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "codes", "codes": [0, 9]}, "0 to 8"),
        ({"type": "codes", "codes": [1.5]}, "0 to 8"),
        ({"type": "codes", "codes": [True]}, "0 to 8"),
        ({"type": "codes", "codes": []}, "0 to 8"),
        ({"type": "codes", "codes": "12"}, "0 to 8"),
        ({"type": "codes"}, "without codes"),
        ({"type": "latents", "latents": [[1.0, 2.0]]}, "list of 3"),
        ({"type": "latents", "latents": [[1.0, 2.0, float("nan")]]}, "list of 3"),
        ({"type": "latents", "latents": [[1.0, 2.0, "x"]]}, "list of 3"),
        ({"type": "latents", "latents": []}, "list of 3"),
    ],
)
def test_what_is_not_generated_is_rejected(part, named):
    _, transform = generating()
    with pytest.raises(DataError, match=named) as error:
        transform(drawn(part))
    assert "here, message 2" in str(error.value)


def test_a_model_without_the_decoder_refuses_its_parts():
    transform = transform_of(config_of("dinov2"))
    with pytest.raises(DataError, match="no place for codes"):
        transform(drawn({"type": "codes", "codes": CODES}))
