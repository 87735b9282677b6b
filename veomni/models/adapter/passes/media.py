"""Encoders of images, videos and audio: found on the instance, and run in every micro-batch on every rank.

A rank whose rows hold no image would leave the others waiting in the collectives of the encoder. It runs the encoder on
the smallest legal dummy and places no feature of it: value and gradient are exactly those without.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veomni.batch.forward_call import ForwardCall, current_call
from veomni.errors import DataError
from veomni.families import encoders
from veomni.families.record import family_record
from veomni.logging import create_logger
from veomni.models.adapter.adapter import InputPass, ModelAdapter, Stage
from veomni.models.adapter.passes.positions import add_fractions
from veomni.models.transformers_api.capabilities import is_pretrained
from veomni.models.transformers_api.encoders import audio_lengths
from veomni.ops.encoders.towers import Items, TowerCall, TowerKind

logger = create_logger(__name__)

_KINDS = (
    ("audio", "get_audio_features", "input_features", "feature_attention_mask", None),
    ("image", "get_image_features", "pixel_values", "image_grid_thw", 1),
    ("video", "get_video_features", "pixel_values_videos", "video_grid_thw", 2),
)
"""Modality, method, its arguments of values and sizes, and the modality's number in ``mm_token_type_ids``."""


def prepare_towers(model: nn.Module) -> None:
    """Make the encoders of a transformers model run in every forward, whatever its batch holds; before it is sharded.

    Other models are left alone; calling it again changes nothing.
    """
    owner = media_owner(model)
    adapter = ModelAdapter.of(model)
    if owner is None or adapter.towers:
        return
    merges = encoders.merges_audio_in_forward(owner)
    if merges:
        adapter.patch(owner, "get_audio_features", partial(encoders.encode_audio, owner))
    calls = {kind.modality: call for kind in _kinds(owner) if (call := _tower_call(owner, kind)) is not None}
    adapter.towers = calls
    for call in calls.values():
        adapter.patch(owner, call.kind.method, call)
    if any(call.kind.token_type for call in calls.values()):
        distinguish = DistinguishPlaceholders(owner)
        adapter.patch(owner, "get_placeholder_mask", distinguish.masks)
        adapter.add(distinguish, on=owner)
    adapter.add(FillIn(owner, calls), on=owner)
    if merges:
        adapter.add(encoders.PlaceAudio(owner), on=owner)
    encoders.mask_audio_padding(adapter, owner)
    add_fractions(adapter)
    _freeze_unread(adapter, owner)


class FillIn(InputPass):
    """Gives encoders the items that a batch lacks, and keeps what they alone take from the language model."""

    stage = Stage.MEDIA

    def __init__(self, owner: nn.Module, calls: Mapping[str, TowerCall]) -> None:
        self.calls = calls
        self.named = frozenset(inspect.signature(type(owner).forward).parameters)

    def before(self, call: ForwardCall) -> None:
        """Put dummies where there is nothing, and precomputed inputs where encoders look for them."""
        given = call.kwargs.get("input_ids")
        given = call.kwargs.get("inputs_embeds") if given is None else given
        if given is None or call.kwargs.get("past_key_values") is not None:
            return
        for modality, tower in self.calls.items():
            own = [name for name in call.kwargs if name.startswith(f"{modality}_") and name not in self.named]
            tower.precomputed = {name: call.kwargs.pop(name) for name in own}
            if call.kwargs.get(tower.kind.values) is None:
                call.kwargs[tower.kind.values] = tower.stand_in(given.device)


class DistinguishPlaceholders(InputPass):
    """Finds the placeholders of images and of videos by ``mm_token_type_ids``."""

    stage = Stage.MEDIA

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.present = (False, False)

    def before(self, call: ForwardCall) -> None:
        """Keep which media there are."""
        images, videos = (call.kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
        self.present = (images, videos)

    def masks(
        self, input_ids: Tensor, inputs_embeds: Tensor, image_features: Any = None, video_features: Any = None
    ) -> Any:
        """Return where images and videos are, bool ``[batch, seq, 1]`` each; in place of ``get_placeholder_mask``."""
        call = current_call()
        types = None if call is None else call.kwargs.get("mm_token_type_ids")
        marked = input_ids == self.owner.config.image_token_id
        if types is not None:
            found = [marked & (types == number) for number in (1, 2)]
        elif all(self.present):
            problem = "a batch with images and videos does not say which placeholders are which"
            raise DataError(problem, "give mm_token_type_ids (the processor returns them)")
        else:
            found = [marked if there else torch.zeros_like(marked) for there in self.present]
        for mask, features in zip(found, (image_features, video_features), strict=True):
            if features is not None and int(mask.sum()) != len(features):
                problem = f"the batch has {int(mask.sum())} placeholders for {len(features)} features"
                raise DataError(problem, "give each image and video as many placeholders as it has features")
        return tuple(mask.unsqueeze(-1) for mask in found)


def media_owner(model: nn.Module) -> nn.Module | None:
    """Return the module whose forward calls the encoders of a transformers model, or None.

    It is the innermost: a model with a head only passes on what the body inside does.
    """
    if not is_pretrained(model):
        return None
    for module in model.modules():
        if hasattr(module, "get_placeholder_mask") and hasattr(module, "get_image_features"):
            return module
        if hasattr(module, "audio_tower") and hasattr(module, "multi_modal_projector"):
            return module
    return None


def _kinds(owner: Any) -> Iterator[TowerKind]:
    config = owner.config
    grids = hasattr(getattr(config, "vision_config", None), "spatial_merge_size")
    shared = family_record(config).shared_placeholder
    for modality, method, values, sizes, number in _KINDS:
        audio = modality == "audio"
        encoder = getattr(config, "audio_config" if audio else "vision_config", None)
        if hasattr(owner, method) and encoder is not None:
            token, token_type = ("image_token_id", number) if shared else (f"{modality}_token_id", None)
            own_sizes = sizes if audio or grids else None
            yield TowerKind(modality, method, values, own_sizes, grids and not audio, token, token_type)


def _tower_call(owner: Any, kind: TowerKind) -> TowerCall | None:
    dummy = _smallest(owner, kind)
    audio = kind.modality == "audio" and hasattr(owner, "audio_tower")
    lengths = audio_lengths(owner.audio_tower) if audio else None
    if dummy is None or (audio and lengths is None):
        logger.warning_rank0(
            "%s: no smallest %s is known, so every rank must be given one in every micro-batch",
            type(owner).__name__, kind.modality,
        )  # fmt: skip
        return None
    counts = None if lengths is None else partial(_audio_counts, lengths)
    return TowerCall(getattr(owner, kind.method), kind, dummy, counts)


def _audio_counts(lengths: Callable[[Tensor], tuple[Tensor | None, Tensor]], items: Items) -> list[int]:
    assert items.sizes is not None
    return [int(count) for count in lengths(items.sizes.sum(-1))[1].tolist()]


def _smallest(owner: Any, kind: TowerKind) -> Callable[[torch.device], Items] | None:
    """Return a function that makes the smallest legal item; None for an encoder that is not known."""
    taken = inspect.signature(getattr(owner, kind.method)).parameters
    if not {kind.values, kind.sizes or kind.values} <= taken.keys():
        return None
    if kind.modality == "audio":
        audio = owner.config.audio_config
        frames = 2 * audio.max_source_positions if family_record(audio).padded_audio else 8
        mask = (torch.arange(frames, device="cpu") < 8).long()[None]
        return partial(_item, kind, (1, audio.num_mel_bins, frames), mask)
    vision = owner.config.vision_config
    if kind.patches and hasattr(vision, "temporal_patch_size"):
        side = vision.spatial_merge_size
        channels = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
        return partial(_item, kind, (side * side, channels), torch.tensor([[1, side, side]], device="cpu"))
    size = getattr(vision, "image_size", None)
    if kind.patches or size is None or family_record(vision).any_size:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return partial(_item, kind, (1, vision.num_channels, height, width), None)


def _item(kind: TowerKind, shape: tuple[int, ...], sizes: Tensor | None, device: torch.device) -> Items:
    return Items(kind, torch.zeros(shape, device=device), None if sizes is None else sizes.to(device))


def _freeze_unread(adapter: ModelAdapter, owner: nn.Module) -> None:
    # They never get a gradient, which DistributedDataParallel would wait for; frozen, they cost no optimizer state.
    unread = {id(parameter) for parameter in encoders.unread_parameters(owner)}
    named = [name for name, each in adapter.model.named_parameters() if id(each) in unread and each.requires_grad]
    _require_grad(adapter.model, named, False)
    adapter.on_remove(partial(_require_grad, adapter.model, named, True))
    if named:
        logger.info_rank0("%s parameters of encoders are never read, and frozen: %s ...", len(named), named[0])


def _require_grad(model: nn.Module, names: list[str], value: bool) -> None:
    parameters = dict(model.named_parameters())
    for name in names:
        if name in parameters:  # a strategy may have joined them to others
            parameters[name].requires_grad_(value)
