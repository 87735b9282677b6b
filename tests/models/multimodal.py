"""Tiny vision-language and omni models, and random samples for them in the form that their processors give."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from tests.models.tiny import _MOE, _MROPE, _TEXT, _TOWER, OTHER_MODELS

IMAGE, VIDEO, VISION_START, VISION_END, AUDIO, AUDIO_START, AUDIO_END = range(120, 127)
_VISION_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
               "vision_end_token_id": VISION_END}  # fmt: skip
_AUDIO_IDS = {"audio_token_id": AUDIO, "audio_start_token_id": AUDIO_START, "audio_end_token_id": AUDIO_END}
MELS, AUDIO_SPAN = 8, 40
_AUDIO_TOWER: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": MELS,
    "max_source_positions": AUDIO_SPAN, "n_window": 10, "output_dim": 32,
}  # fmt: skip
_SQUARE = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
           "num_attention_heads": 2}  # fmt: skip
_INTERLEAVED = {**_MROPE, "mrope_interleaved": True}
_DEEP = {**_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        **_VISION_IDS,
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
        "vision_config": {
            "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        },
    },
    "qwen2_5_vl": {**OTHER_MODELS["qwen2_5_vl"], **_VISION_IDS},
    "qwen3_vl": {**OTHER_MODELS["qwen3_vl"], **_VISION_IDS},
    "qwen3_vl_moe": {**OTHER_MODELS["qwen3_vl_moe"], **_VISION_IDS},
    "glm4v": {
        **_VISION_IDS, "image_start_token_id": VISION_START, "image_end_token_id": VISION_END,
        "video_start_token_id": VISION_START, "video_end_token_id": VISION_END,
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
        "vision_config": {
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "image_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "out_hidden_size": 32,
        },
    },
    "internvl": {
        "image_token_id": IMAGE, "text_config": {"model_type": "qwen2", **_TEXT}, "image_seq_length": 4,
        "vision_config": {**_SQUARE, "image_size": [16, 16], "patch_size": [4, 4]},
    },
    "llava": {
        "image_token_id": IMAGE, "image_seq_length": 16, "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", **_SQUARE, "projection_dim": 16},
    },
    "gemma3": {
        "image_token_id": IMAGE, "boi_token_id": VISION_START, "eoi_token_id": VISION_END, "mm_tokens_per_image": 4,
        "text_config": {
            **_TEXT, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
        "vision_config": {"model_type": "siglip_vision_model", **_SQUARE},
    },
    "qwen2_audio": {
        "audio_token_id": AUDIO, "text_config": {"model_type": "qwen2", **_TEXT},
        "audio_config": {key: value for key, value in _AUDIO_TOWER.items() if key not in ("n_window", "output_dim")},
    },
    "qwen2_5_omni_thinker": {
        **_VISION_IDS, **_AUDIO_IDS, "image_token_index": IMAGE, "video_token_index": VIDEO,
        "audio_token_index": AUDIO,
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
        "audio_config": _AUDIO_TOWER,
        "vision_config": {**_TOWER, "fullatt_block_indexes": [1], "window_size": 16},
    },
    "qwen3_omni_moe_thinker": {
        **_VISION_IDS, **_AUDIO_IDS,
        "text_config": {**_TEXT, **_MOE, "rope_parameters": _INTERLEAVED},
        "audio_config": {**_AUDIO_TOWER, "n_window": 50, "n_window_infer": 200, "downsample_hidden_size": 8},
        "vision_config": _DEEP,
    },
}  # fmt: skip
"""Model type to what its tiny configuration sets."""

MROPE = [name for name in FAMILIES if name.startswith(("qwen2_vl", "qwen2_5", "qwen3", "glm4v"))]
VIDEOS = MROPE
SOUNDS = ["qwen2_audio", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"]
IMAGES = [name for name in FAMILIES if name != "qwen2_audio"]


def family_config(name: str, **changes: Any) -> Any:
    """Return a fresh tiny configuration of one of :data:`FAMILIES`."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[name](**deepcopy({**FAMILIES[name], **changes}))
    config.use_cache = config.get_text_config().use_cache = False
    return config


Part = tuple[str, Any]
"""("text", tokens), ("image", grid), ("video", grid) or ("audio", frames)."""

TEXT_ONLY: list[Part] = [("text", 9)]


def documents_of(name: str) -> list[list[Part]]:
    """Documents that a family may meet: media first, media last, several, none."""
    documents: list[list[Part]] = [[("text", 5)]]
    if name in IMAGES:
        documents.append([("image", (1, 4, 4)), ("text", 4)])
        documents.append([("text", 3), ("image", (1, 4, 8)), ("text", 2), ("image", (1, 8, 4))])
    if name in SOUNDS:
        documents.append([("text", 2), ("audio", 24), ("text", 3), ("audio", 40)])
    if name in VIDEOS:
        documents.append([("video", (2, 4, 4)), ("text", 6)])
    if name in IMAGES and name in SOUNDS:
        documents.append([("image", (1, 4, 4)), ("text", 2), ("audio", 29), ("video", (3, 4, 4)), ("text", 1)])
    return documents


@dataclass
class Sampler:
    """Makes samples of one family: tensors of one document each, as a processor would give them."""

    name: str
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.config = family_config(self.name)

    def __call__(self, parts: Sequence[Part]) -> dict[str, torch.Tensor]:
        pieces: list[tuple[list[int], int]] = []
        media: dict[str, list[torch.Tensor]] = {}
        for kind, amount in parts:
            pieces += getattr(self, f"_{kind}")(amount, media)
        ids = torch.tensor([token for tokens, _ in pieces for token in tokens])
        kinds = torch.tensor([kind for tokens, kind in pieces for _ in tokens])
        labels = torch.where(ids >= 120, -100, ids)
        labels[::4] = -100
        sample = {"input_ids": ids, "labels": labels, **{key: self._joined(key, media[key]) for key in media}}
        if self.name == "gemma3":
            sample["token_type_ids"] = kinds
        if self.name in MROPE and "omni" not in self.name:
            sample["mm_token_type_ids"] = kinds
        return sample

    def _joined(self, key: str, values: list[torch.Tensor]) -> torch.Tensor:
        if key in ("input_features", "feature_attention_mask"):
            longest = 2 * AUDIO_SPAN if self.name == "qwen2_audio" else max(value.shape[-1] for value in values)
            values = [torch.nn.functional.pad(value, (0, longest - value.shape[-1])) for value in values]
        return torch.cat(values)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).double()

    def _text(self, amount: int, media: dict[str, list[torch.Tensor]]) -> list[tuple[list[int], int]]:
        return [(torch.randint(3, 110, (amount,), generator=self.generator).tolist(), 0)]

    def _image(self, grid: Any, media: dict[str, list[torch.Tensor]]) -> list[tuple[list[int], int]]:
        if self.name in MROPE:
            tokens = self._patches("pixel_values", "image_grid_thw", grid, media)
        else:
            media.setdefault("pixel_values", []).append(self._random(1, 3, 16, 16))
            tokens = 16 if self.name == "llava" else 4
        return [([VISION_START], 0), ([IMAGE] * tokens, 1), ([VISION_END], 0)]

    def _video(self, grid: Any, media: dict[str, list[torch.Tensor]]) -> list[tuple[list[int], int]]:
        tokens = self._patches("pixel_values_videos", "video_grid_thw", grid, media)
        if self.name == "qwen2_5_vl":
            media.setdefault("second_per_grid_ts", []).append(torch.tensor([2.0]))
        if "omni" in self.name:
            media.setdefault("video_second_per_grid", []).append(torch.tensor([0.7]))  # no whole positions of Qwen3's
        token = IMAGE if self.name == "glm4v" else VIDEO
        if self.name in ("glm4v", "qwen3_vl", "qwen3_vl_moe"):  # each frame alone, after its timestamp
            frame: list[tuple[list[int], int]] = [
                ([7, 8], 0), ([VISION_START], 0), ([token] * (tokens // grid[0]), 2), ([VISION_END], 0)
            ]  # fmt: skip
            return frame * grid[0]
        return [([VISION_START], 0), ([token] * tokens, 2), ([VISION_END], 0)]

    def _audio(self, frames: int, media: dict[str, list[torch.Tensor]]) -> list[tuple[list[int], int]]:
        media.setdefault("input_features", []).append(self._random(1, MELS, frames))
        media.setdefault("feature_attention_mask", []).append(torch.ones(1, frames, dtype=torch.int64))
        return [([AUDIO_START], 0), ([AUDIO] * self.audio_tokens(frames), 3), ([AUDIO_END], 0)]

    def audio_tokens(self, frames: int) -> int:
        if self.name == "qwen3_omni_moe_thinker":
            return -(-frames // 8)  # three convolutions of stride 2
        return ((frames - 1) // 2 + 1 - 2) // 2 + 1

    def _patches(self, key: str, sizes: str, grid: Any, media: dict[str, list[torch.Tensor]]) -> int:
        patches = grid[0] * grid[1] * grid[2]
        media.setdefault(key, []).append(self._random(patches, 3 * 2 * 4 * 4))
        media.setdefault(sizes, []).append(torch.tensor([grid]))
        return patches // 4


def alone(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a sample as a batch of one, as people would give it to transformers."""
    tokens = ("input_ids", "labels", "mm_token_type_ids", "token_type_ids")
    batch = {key: value[None] if key in tokens else value for key, value in sample.items()}
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def family_model(name: str, attention: str = "eager", seed: int = 0) -> Any:
    """Return a tiny model in float64 whose weights are spread, so that what should not be seen would show."""
    from veomni.models import Materializer, build_model

    model = build_model(family_config(name), attention=attention, weights="random")
    Materializer(model, device=torch.device("cpu"), seed=seed)(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = parameter.data.double() + 0.15 * noise
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Take the gradients off a model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of a gradient, per tensor.

    A bias of keys has no gradient but for rounding (softmax does not see it): it is measured by the largest gradient.
    """
    assert found.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    scales = {key: largest if key.endswith("k_proj.bias") else value.norm() for key, value in expected.items()}
    errors = {key: (found[key] - value).norm() / (scales[key] or 1) for key, value in expected.items()}
    return float(max(errors.values()))
