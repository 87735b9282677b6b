"""What a family of models does differently where no examination of a model can find it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FamilyRecord:
    """One family of models, or of encoders; read by the side of models and by the side of data.

    Attributes:
        model_types: The ``model_type`` of its configurations.
        thinker: Of a model that also speaks, the type of the component that is trained.
        loss_in_forward: The model computes the causal loss in its forward, and not by its ``loss_function``.
        shared_placeholder: Images and videos have the same placeholder token; ``mm_token_type_ids`` distinguishes them.
        any_size: The encoder takes images of any size, with arguments of its own for them.
        padded_audio: The encoder takes mel features that are padded to its whole span, and masks the padding.
        audio_seconds: The longest audio clip that the encoder takes, where the model's files do not say.
        after_last_norm: Features of layer -1 are what comes after the last norm.
        unread: Parts of names of parameters that no forward reads, though checkpoints have them.
    """

    model_types: tuple[str, ...]
    thinker: str | None = None
    loss_in_forward: bool = False
    shared_placeholder: bool = False
    any_size: bool = False
    padded_audio: bool = False
    audio_seconds: int = 30
    after_last_norm: bool = False
    unread: tuple[str, ...] = ()


_ALL = (
    FamilyRecord(("glm4v", "glm4v_moe"), shared_placeholder=True),
    FamilyRecord(("internvl",), after_last_norm=True),
    FamilyRecord(("pixtral",), any_size=True),
    FamilyRecord(("qwen2_audio",), loss_in_forward=True),
    FamilyRecord(("qwen2_audio_encoder",), padded_audio=True),
    FamilyRecord(("qwen2_5_omni",), thinker="qwen2_5_omni_thinker"),
    FamilyRecord(("qwen2_5_omni_thinker",), unread=("audio_bos_eos_token.",)),
    FamilyRecord(("qwen2_5_omni_audio_encoder", "qwen3_omni_moe_audio_encoder"), audio_seconds=300),
    FamilyRecord(("qwen3_omni_moe",), thinker="qwen3_omni_moe_thinker"),
)
RECORDS = {model_type: family for family in _ALL for model_type in family.model_types}
"""Model type to its family; a model that needs no record has none."""


def family_record(config: Any) -> FamilyRecord:
    """Return the family of a configuration, or of a model type by its name; one without differences for others."""
    model_type = config if isinstance(config, str) else getattr(config, "model_type", "")
    return RECORDS.get(model_type, FamilyRecord((model_type,)))
