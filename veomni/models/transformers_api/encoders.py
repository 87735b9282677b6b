"""Encoders of images, videos and audio, and the positions of what they encode."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


def rope_rule(model_class: type[Any], config: Any) -> Any:
    """Return an object with a model family's ``get_rope_index`` and nothing else of the model, or None without one.

    The method may belong to the body inside of ``model_class``.
    """
    from transformers import MODEL_MAPPING

    body: Any = MODEL_MAPPING.get(type(config), None)
    owner: Any = next((cls for cls in (model_class, body) if hasattr(cls, "get_rope_index")), None)
    if owner is None:
        return None
    rule = owner.__new__(owner)
    nn.Module.__init__(rule)
    rule.config, rule.rope_deltas = config, None
    rule.spatial_merge_size = config.vision_config.spatial_merge_size
    return rule


def vision_inputs(config: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what encoders of images and videos derive from sizes alone, by the names that models take it under.

    It is computed where sizes are still on the CPU: an encoder would read them back from the accelerator, and wait. For
    images (and likewise videos) ``image_cu_seqlens`` int32 ``[frames + 1]``, ``image_position_ids`` ``[patches, 2]``,
    and where attention has windows ``image_window_index`` and ``image_cu_window_seqlens``.
    """
    from transformers import vision_utils

    vision = getattr(config, "vision_config", None)
    merge = getattr(vision, "spatial_merge_size", None)
    found: dict[str, Tensor] = {}
    for modality, key in _GRIDS.items():
        grid = batch.get(key)
        if vision is None or merge is None or grid is None:
            continue
        found[f"{modality}_cu_seqlens"] = vision_utils.get_vision_cu_seqlens(grid)
        found[f"{modality}_position_ids"] = vision_utils.get_vision_position_ids(grid, merge)
        if hasattr(vision, "fullatt_block_indexes"):
            windows = vision_utils.get_vision_window_index(grid, merge, vision.window_size, vision.patch_size)
            found[f"{modality}_window_index"], found[f"{modality}_cu_window_seqlens"] = windows
    return found


def audio_lengths(encoder: Any) -> Callable[[Tensor], tuple[Tensor | None, Tensor]] | None:
    """Return the function from frames ``[clips]`` to those after the convolutions and to the features of each clip.

    The first are None where the encoder's module has a function of the second alone; None without either function.
    """
    method = getattr(encoder, "_get_feat_extract_output_lengths", None)
    if method is not None:
        return method
    function = getattr(sys.modules[type(encoder).__module__], "_get_feat_extract_output_lengths", None)
    if function is None:
        return None
    options = {"n_window": encoder.n_window} if "n_window" in inspect.signature(function).parameters else {}
    return lambda frames: (None, function(frames, **options))


def encode_padded_audio(encoder: Any, input_features: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
    """Return the output of an encoder of Whisper's family, which does not see padding, and the features of each clip.

    Mel features are ``[clips, mels, frames]``, padded to the encoder's span; ``mask`` is where frames hold audio.
    """
    from transformers.masking_utils import create_bidirectional_mask

    frames, features = encoder._get_feat_extract_output_lengths(mask.sum(-1))
    places = torch.arange((input_features.shape[-1] - 2) // 2 + 1, device=input_features.device)
    seen = places < frames[:, None]
    stand_in = input_features.new_zeros(*seen.shape, 1)
    made = create_bidirectional_mask(config=encoder.config, inputs_embeds=stand_in, attention_mask=seen.long())
    return encoder(input_features, attention_mask=made), features
