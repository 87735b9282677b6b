"""A model directory, media and conversations for the ready multimodal configurations, at a size that CPUs train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data.multimodal.families import SPECS, tokenizer_of
from tests.data.multimodal.small_model import save_media
from veomni.models import build_config

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs/multimodal").glob("qwen*.yaml"))}

_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_PATCHES = {"temporal_patch_size": 2, "merge_size": 2, "image_processor_type": "Qwen2VLImageProcessor"}
_OLDER = {**_PATCHES, "min_pixels": 3136, "max_pixels": 12_845_056}
_EARS = {
    "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128, "hop_length": 160, "n_fft": 400,
    "n_samples": 4_800_000, "nb_max_frames": 30_000, "padding_side": "right", "padding_value": 0.0,
    "return_attention_mask": True, "sampling_rate": 16_000,
}  # fmt: skip
_IMAGES, _VIDEOS = "preprocessor_config.json", "video_preprocessor_config.json"
_QWEN3_VL = {
    _IMAGES: {**_PATCHES, **_HALF, "patch_size": 16, "size": {"longest_edge": 16_777_216, "shortest_edge": 65_536}},
    _VIDEOS: {**_PATCHES, **_HALF, "patch_size": 16, "size": {"longest_edge": 25_165_824, "shortest_edge": 4096}},
}
PROCESSORS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2_5_vl": {_IMAGES: {**_OLDER, **_CLIP, "patch_size": 14}},
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
    "qwen2_5_omni_thinker": {_IMAGES: {**_OLDER, **_CLIP, **_EARS, "patch_size": 14, "chunk_length": 300}},
    "qwen3_omni_moe_thinker": {_IMAGES: {**_OLDER, **_HALF, **_EARS, "patch_size": 16}},
}
"""Model type to the files that its publisher ships beside the weights."""


def small(name: str) -> tuple[str, dict[str, Any]]:
    """Return the model type of a ready configuration, and what makes its model small enough: widths and depths only."""
    architecture: Any = build_config(ROOT / f"configs/model_configs/{name}.json")
    kind, text = architecture.model_type, architecture.get_text_config()
    rope = {**text.rope_parameters, "mrope_section": [2, 1, 1]}
    changes: dict[str, Any] = {
        "text_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 400, "rope_parameters": rope,
        },
        "vision_config": {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2,
                          "out_hidden_size": 32},
    }  # fmt: skip
    if "head_dim" in text.to_dict():
        changes["text_config"]["head_dim"] = 8
    if "moe" in kind:
        changes["text_config"] |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    whole = "fullatt_block_indexes" if "2_5" in kind else "deepstack_visual_indexes"
    changes["vision_config"][whole] = [1]
    if "omni" in kind:
        changes["audio_config"] = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2,
                                   "encoder_ffn_dim": 32, "output_dim": 32}  # fmt: skip
    if kind == "qwen3_omni_moe_thinker":
        changes["audio_config"]["downsample_hidden_size"] = 8
    tokenizer = tokenizer_of(kind)
    return kind, changes | {key: tokenizer.convert_tokens_to_ids(token) for key, token in SPECS[kind]["ids"].items()}


def prepare(folder: Path, name: str, sounds: bool) -> None:
    """Write tokenizer, processor files, media and conversations below a folder."""
    kind, _ = small(name)
    tokenizer_of(kind).save_pretrained(folder / "model")
    for file, values in PROCESSORS[kind].items():
        (folder / "model" / file).write_text(json.dumps(values))
    save_media(folder / "media")
    answer = {"role": "assistant", "content": "some words"}
    asked: list[tuple[str, dict[str, list[str]]]] = [
        ("what?", {}), ("<image>what?", {"images": ["photo.jpg"]}), ("<video>a", {"videos": ["clip.mp4"]}),
        ("<image><image>b", {"images": ["chart.png", "photo.jpg"]}),
    ]  # fmt: skip
    if sounds:
        asked.append(("<audio>heard?", {"audios": ["tone.wav"]}))
    rows = [{"messages": [{"role": "user", "content": text}, answer], **media} for text, media in asked]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(folder: Path, name: str) -> list[str]:
    """Return a command line for one CPU process: smaller model, shorter rows, and the paths of a folder."""
    _, changes = small(name)
    values = {
        "model.config_path": ROOT / f"configs/model_configs/{name}.json",
        "model.model_path": None,
        "model.tokenizer_path": folder / "model",
        "model.config_overrides": changes,
        "data.train_path": folder / "talks.jsonl",
        "data.media.root": folder / "media",
        "data.max_seq_len": 1600,
        "data.cache_dir": folder / "cache",
        "data.num_workers": 0,
        "data.stream_shards": 2,
        "train.output_dir": folder / "output",
        "train.accelerator": "cpu",
        "train.devices": 1,
        "train.precision": "fp32",
        "train.max_steps": 2,
        "train.global_batch_size": 2,
        "train.expert_parallel_size": 1,
        "train.optimizer.lr": 1e-2,
    }
    return [str(CONFIGS[name]), *(f"--{key}={json.dumps(value, default=str)}" for key, value in values.items())]
