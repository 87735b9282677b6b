"""Every family on a tokenizer trained on the spot, and transformers' processor of the same parts as its oracle."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from veomni.data import CHAT_TEMPLATES, train_byte_bpe
from veomni.data.multimodal.family import Family
from veomni.data.multimodal.processors import MediaSettings, build_family
from veomni.data.multimodal.transform import MultimodalTransform

_PADS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
         "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
_CAPITALS = {
    "image_token_id": "<|IMAGE|>", "video_token_id": "<|VIDEO|>", "audio_token_id": "<|AUDIO|>",
    "vision_start_token_id": "<|vision_bos|>", "vision_end_token_id": "<|vision_eos|>",
    "audio_start_token_id": "<|audio_bos|>", "audio_end_token_id": "<|audio_eos|>",
}  # fmt: skip
_PATCHES = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_SQUARE = {"image_size": 16, "patch_size": 4}
_EARS = {"num_mel_bins": 8, "max_source_positions": 50, "n_window": 10}

SPECS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"ids": _PADS, "template": "qwen-vl", "config": {"vision_config": _PATCHES}},
    "qwen2_5_vl": {"ids": _PADS, "template": "qwen-vl", "config": {"vision_config": _PATCHES}},
    "qwen3_vl": {"ids": _PADS, "template": "qwen3-vl", "config": {"vision_config": _PATCHES}},
    "qwen3_vl_moe": {"ids": _PADS, "template": "qwen3-vl", "config": {"vision_config": _PATCHES}},
    "glm4v": {
        "ids": {
            "image_token_id": "<|image|>", "video_token_id": "<|video|>", "image_start_token_id": "<|begin_of_image|>",
            "image_end_token_id": "<|end_of_image|>", "video_start_token_id": "<|begin_of_video|>",
            "video_end_token_id": "<|end_of_video|>",
        },
        "template": "glm4v", "config": {"vision_config": _PATCHES},
    },
    "internvl": {
        "ids": {"image_token_id": "<IMG_CONTEXT>"}, "more": ["<video>", "<img>", "</img>"], "template": "internvl",
        "config": {"image_seq_length": 4, "vision_config": {"image_size": [16, 16], "patch_size": [4, 4]}},
    },
    "llava": {
        "ids": {"image_token_id": "<image>"}, "template": "llava",
        "config": {"vision_config": {"model_type": "clip_vision_model", **_SQUARE}},
    },
    "gemma3": {
        "ids": {"image_token_id": "<image_soft_token>", "boi_token_id": "<start_of_image>",
                "eoi_token_id": "<end_of_image>"},
        "template": "gemma3",
        "config": {"mm_tokens_per_image": 4, "vision_config": {"model_type": "siglip_vision_model", **_SQUARE}},
    },
    "qwen2_audio": {
        "ids": {"audio_token_id": "<|AUDIO|>"}, "more": ["<|audio_bos|>", "<|audio_eos|>"], "template": "qwen2-audio",
        "config": {"audio_config": {key: value for key, value in _EARS.items() if key != "n_window"}},
    },
    "qwen2_5_omni_thinker": {
        "ids": _CAPITALS, "template": "qwen-omni", "config": {"audio_config": _EARS, "vision_config": _PATCHES}
    },
    "qwen3_omni_moe_thinker": {
        "ids": {**_PADS, "audio_token_id": "<|audio_pad|>", "audio_start_token_id": "<|audio_start|>",
                "audio_end_token_id": "<|audio_end|>"},
        "template": "qwen3-omni",
        "config": {"audio_config": {**_EARS, "n_window": 50}, "vision_config": _PATCHES},
    },
}  # fmt: skip
"""Model type to its placeholders, template and tiny configuration."""

IMAGES = [name for name in SPECS if name != "qwen2_audio"]
VIDEOS = [name for name in SPECS if "video" in str(SPECS[name])]
SOUNDS = [name for name in SPECS if "audio_config" in SPECS[name]["config"]]
_RENAMED = {
    "qwen2_5_omni_thinker": "qwen2_5_omni",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe",
    "qwen3_vl_moe": "qwen3_vl",
}


@lru_cache
def tokenizer_for(tokens: Sequence[str]) -> Any:
    tokenizer = train_byte_bpe(["what is to be seen in it, and what is to be heard? a b c: some words."] * 2, 340)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *tokens]})
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


def tokenizer_of(name: str) -> Any:
    return tokenizer_for((*SPECS[name]["ids"].values(), *SPECS[name].get("more", ())))


def config_of(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    ids = {key: tokenizer_of(name).convert_tokens_to_ids(token) for key, token in SPECS[name]["ids"].items()}
    config = CONFIG_MAPPING[name](**SPECS[name]["config"])
    for key, index in ids.items():  # some have them under several names
        setattr(config, key, index)
    return config


def family_for(name: str, **settings: Any) -> Family:
    return build_family(config_of(name), tokenizer_of(name), None, MediaSettings(**settings))


def transform_for(name: str, reader: Any = None, **settings: Any) -> MultimodalTransform:
    template = CHAT_TEMPLATES.get(SPECS[name]["template"])
    return MultimodalTransform(family_for(name, **settings), tokenizer_of(name), template, reader)


def oracle(name: str, family: Family, video_processor: Any = None) -> Any:
    """Transformers' processor of the same parts; its own constructor wants torchvision."""
    folder = _RENAMED.get(name, name)
    module = import_module(f"transformers.models.{folder}.processing_{folder}")
    kind = next(
        value
        for key, value in vars(module).items()
        if key.endswith("Processor") and value.__module__ == module.__name__
    )
    tokenizer, config = tokenizer_of(name), family.config
    processor = object.__new__(kind)
    vars(processor).update(
        tokenizer=tokenizer, image_processor=family.image_processor,
        video_processor=video_processor or SimpleNamespace(merge_size=2),
        feature_extractor=family.feature_extractor, patch_size=4,
        image_seq_length=getattr(config, "image_seq_length", None), num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    for key, token in SPECS[name]["ids"].items():
        vars(processor).update({key.removesuffix("_id"): token, key: tokenizer.convert_tokens_to_ids(token)})
        stem = key.removesuffix("_token_id")
        for old, new in (("_start", "_bos"), ("_end", "_eos")):
            vars(processor)[f"{stem.replace(old, new)}_token"] = token
    _complete(name, processor, tokenizer)
    return processor


def _complete(name: str, processor: Any, tokenizer: Any) -> None:
    import re

    if name == "internvl":
        vars(processor).update(start_image_token="<img>", end_image_token="</img>", video_token="<video>")
        for key in ("start_image", "end_image"):
            vars(processor)[f"{key}_token_id"] = tokenizer.convert_tokens_to_ids(vars(processor)[f"{key}_token"])
        processor.multimodal_pattern = re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)")
    if name == "gemma3":
        vars(processor).update(
            image_token="<start_of_image>", boi_token="<start_of_image>",
            full_image_sequence="\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n",
        )  # fmt: skip
        tokenizer.image_token, tokenizer.image_token_id = (
            "<image_soft_token>", tokenizer.convert_tokens_to_ids("<image_soft_token>")
        )  # fmt: skip
    if name == "glm4v":
        processor.video_start_id, processor.video_end_id = processor.video_start_token_id, processor.video_end_token_id
