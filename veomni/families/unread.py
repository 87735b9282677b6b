"""Parameters of encoders that no forward reads."""

from __future__ import annotations

from typing import Any

from torch import nn

from veomni.families.record import family_record

_HEADS = (
    "vision_tower.head.", "vision_tower.vision_model.head.", "image_encoder.head.", "image_encoder.vision_model.head.",
)  # fmt: skip


def unread_parameters(owner: Any) -> list[nn.Parameter]:
    """Return the parameters of encoders that no forward reads.

    They are the layers after the one whose features are taken (LLaVA takes the last but one), heads of encoders whose
    output is not used, and what a family keeps for its checkpoints alone.
    """
    family = family_record(owner.config)
    names = (*_HEADS, *family.unread)
    found = [parameter for name, parameter in owner.named_parameters() if any(part in name for part in names)]
    encoder: Any = getattr(owner, "image_encoder", None)
    if getattr(encoder, "config", None) is not None:  # of a composed model
        return found + (_post_norm(encoder) if encoder.config.model_type == "clip_vision_model" else [])
    layer = getattr(owner.config, "vision_feature_layer", None)
    tower = getattr(owner, "vision_tower", None)
    if tower is None or layer is None or (family.after_last_norm and layer == -1):
        return found
    layers = next(child for child in tower.modules() if isinstance(child, nn.ModuleList))
    hidden_states = len(layers) + 1
    taken = {index % hidden_states for index in (layer if isinstance(layer, list | tuple) else [layer])}
    for unused in layers[max(taken) :]:
        found += unused.parameters()
    return found + _post_norm(tower)


def _post_norm(encoder: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in encoder.named_parameters() if "post_layernorm" in name]
