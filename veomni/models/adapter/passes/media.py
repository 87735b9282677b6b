"""Towers for images, videos and sounds: found on the instance, and run in every micro-batch on every rank.

Sharded and replicated training alike need each rank to run the same layers: a rank whose rows hold no image would
leave the others waiting in the image tower's collectives. Here a model that is given no image, video or sound runs the
tower of each on the smallest legal dummy, in the model's own order, and places none of its features: value and
gradient are exactly those without, zeros for the tower.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veomni.errors import DataError
from veomni.families.towers import (
    audio_counts,
    give_audio_method,
    hear_sounds_apart,
    merges_audio_itself,
    shares_placeholders,
    takes_padded_audio,
    unread_parameters,
)
from veomni.logging import create_logger
from veomni.models.adapter.passes.positions import add_fractions
from veomni.models.transformers_api.capabilities import is_pretrained
from veomni.ops.encoders.towers import TOWERS, Items, TowerCall, TowerKind

logger = create_logger(__name__)

_KINDS = (
    ("audio", "get_audio_features", "input_features", "feature_attention_mask"),
    ("image", "get_image_features", "pixel_values", "image_grid_thw"),
    ("video", "get_video_features", "pixel_values_videos", "video_grid_thw"),
)
_TOKEN_TYPES = {"image": 1, "video": 2}


def prepare_towers(model: nn.Module) -> None:
    """Make the towers of ``model`` run in every forward, whatever its batch holds; other models are left alone.

    Calling it again changes nothing.

    Args:
        model: A transformers model, before it is sharded.
    """
    if not is_pretrained(model) or hasattr(model, TOWERS):
        return
    owner = _owner(model)
    if owner is None:
        return
    own_merge = merges_audio_itself(owner)
    filled: dict[str, TowerCall] = {}
    named = frozenset(inspect.signature(type(owner).forward).parameters)
    owner.register_forward_pre_hook(_fill_in(filled, named), with_kwargs=True)
    if own_merge:
        give_audio_method(owner)
    calls = {kind.modality: call for kind in _kinds(owner) if (call := _tower_call(owner, kind)) is not None}
    setattr(model, TOWERS, calls)
    for call in calls.values():
        setattr(owner, call.kind.method, call)
    if any(call.kind.token_type for call in calls.values()):
        _tell_apart(owner)
    filled.update(calls)
    hear_sounds_apart(owner)
    add_fractions(model)
    _freeze_unread(model, owner)


def _owner(model: nn.Module) -> nn.Module | None:
    """Return the module whose forward calls the towers; one with a head only passes on what the body inside it does."""
    for module in model.modules():
        if hasattr(module, "get_placeholder_mask") and hasattr(module, "get_image_features"):
            return module
        if hasattr(module, "audio_tower") and hasattr(module, "multi_modal_projector"):
            return module
    return None


def _kinds(owner: Any) -> list[TowerKind]:
    config = owner.config
    grids = hasattr(getattr(config, "vision_config", None), "spatial_merge_size")
    shared = shares_placeholders(owner)
    found = []
    for modality, method, values, sizes in _KINDS:
        if hasattr(owner, method) and _has_encoder(config, modality):
            patches = grids and modality != "audio"
            token_type = _TOKEN_TYPES.get(modality) if shared else None
            token = "image_token_id" if shared else f"{modality}_token_id"
            found.append(TowerKind(
                modality, method, values, sizes if patches or modality == "audio" else None, patches, token, token_type
            ))  # fmt: skip
    return found


def _has_encoder(config: Any, modality: str) -> bool:
    return getattr(config, "audio_config" if modality == "audio" else "vision_config", None) is not None


def _tower_call(owner: Any, kind: TowerKind) -> TowerCall | None:
    dummy = _smallest(owner, kind)
    hears = kind.modality == "audio" and hasattr(owner, "audio_tower")
    counts = audio_counts(owner) if hears else None
    if dummy is None or (hears and counts is None):
        logger.warning_rank0(
            "%s: no smallest %s is known, so every rank must be given one in every micro-batch",
            type(owner).__name__, kind.modality,
        )  # fmt: skip
        return None
    return TowerCall(getattr(owner, kind.method), kind, dummy, _of_masks(counts) if counts else None)


def _of_masks(counts: Callable[[Tensor], Tensor]) -> Callable[[Items], list[int]]:
    def of(items: Items) -> list[int]:
        assert items.sizes is not None
        return [int(count) for count in counts(items.sizes.sum(-1)).tolist()]

    return of


def _smallest(owner: Any, kind: TowerKind) -> Callable[[torch.device], Items] | None:
    """Return a function that makes the smallest legal item; None for a tower that is not known."""
    taken = inspect.signature(getattr(owner, kind.method)).parameters
    if not {kind.values, kind.sizes or kind.values} <= taken.keys():
        return None
    if kind.modality == "audio":
        return _smallest_sound(owner, kind)
    vision = owner.config.vision_config
    if kind.patches:
        if not hasattr(vision, "temporal_patch_size"):
            return None
        side = vision.spatial_merge_size
        channels = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
        return lambda device: Items(
            kind, torch.zeros(side * side, channels, device=device), torch.tensor([[1, side, side]], device=device)
        )
    size = getattr(vision, "image_size", None)
    if size is None or getattr(vision, "model_type", "") == "pixtral":
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return lambda device: Items(kind, torch.zeros(1, vision.num_channels, height, width, device=device), None)


def _smallest_sound(owner: Any, kind: TowerKind) -> Callable[[torch.device], Items]:
    audio = owner.config.audio_config
    frames = 2 * audio.max_source_positions if takes_padded_audio(owner) else 8

    def make(device: torch.device) -> Items:
        mask = torch.zeros(1, frames, dtype=torch.int64, device=device)
        mask[:, :8] = 1
        return Items(kind, torch.zeros(1, audio.num_mel_bins, frames, device=device), mask)

    return make


def _fill_in(calls: dict[str, TowerCall], named: frozenset[str]) -> Callable[..., Any]:
    """Return a hook that gives the towers what is missing, and keeps from the language model what is theirs alone.

    Args:
        calls: By modality; may still be filled.
        named: What the owner's forward takes by name: the rest goes to every layer of the language model.
    """

    def fill(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        if given is None or kwargs.get("past_key_values") is not None:
            return args, kwargs
        prefixes = tuple(f"{modality}_" for modality in calls)
        theirs = {name for name in kwargs if name.startswith(prefixes) and name not in named}
        kept = {name: value for name, value in kwargs.items() if name not in theirs}
        for modality, call in calls.items():
            call.precomputed = {name: kwargs[name] for name in theirs if name.startswith(f"{modality}_")}
            if kept.get(call.kind.values) is None:
                kept[call.kind.values] = call.stand_in(given.device)
        return args, kept

    return fill


def _tell_apart(owner: Any) -> None:
    """Let a model whose images and videos share one placeholder token find each by ``mm_token_type_ids``."""
    types: list[Tensor | None] = [None]
    present: list[bool] = [False, False]

    def remember(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        types[0] = kwargs.get("mm_token_type_ids")
        present[:] = [kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_videos")]

    def masks(input_ids: Tensor, inputs_embeds: Tensor, image_features: Any = None, video_features: Any = None) -> Any:
        marked = input_ids == owner.config.image_token_id
        if types[0] is not None:
            found = [marked & (types[0] == number) for number in (1, 2)]
        elif all(present):
            raise DataError(
                "a batch with images and videos does not say which placeholders are which",
                "give mm_token_type_ids (the processor returns them)",
            )
        else:
            found = [marked if there else torch.zeros_like(marked) for there in present]
        for mask, features in zip(found, (image_features, video_features), strict=True):
            if features is not None and int(mask.sum()) != len(features):
                raise DataError(
                    f"the batch has {int(mask.sum())} placeholders for {len(features)} features",
                    "give each image and video as many placeholders as it has features",
                )
        return tuple(mask.unsqueeze(-1) for mask in found)

    owner.register_forward_pre_hook(remember, with_kwargs=True, prepend=True)  # before dummies are filled in
    owner.get_placeholder_mask = masks


def _freeze_unread(model: nn.Module, owner: nn.Module) -> None:
    # They never get a gradient, which DistributedDataParallel would wait for; frozen, they cost no optimizer state.
    unread = {id(parameter) for parameter in unread_parameters(owner)}
    frozen = [name for name, parameter in model.named_parameters() if id(parameter) in unread]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if frozen:
        logger.info_rank0("%s parameters of towers are never read, and frozen: %s ...", len(frozen), frozen[0])
