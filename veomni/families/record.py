"""What a family of models does differently where no examination of a model can find it."""

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
        media: Path "module:class" of the data side's :class:`~veomni.data.multimodal.Family`, imported on use.
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
    media: str = ""


_MEDIA = "veomni.data.multimodal"
_ALL = (
    FamilyRecord(("gemma3",), media=f"{_MEDIA}.tiles:Gemma3"),
    FamilyRecord(("glm4v", "glm4v_moe"), shared_placeholder=True, media=f"{_MEDIA}.qwen_vl:Glm4V"),
    FamilyRecord(("internvl",), after_last_norm=True, media=f"{_MEDIA}.tiles:InternVL"),
    FamilyRecord(("llava",), media=f"{_MEDIA}.tiles:Llava"),
    FamilyRecord(("omni",), media=f"{_MEDIA}.omni:Omni"),
    FamilyRecord(("pixtral",), any_size=True),
    FamilyRecord(("qwen2_vl",), media=f"{_MEDIA}.qwen_vl:Qwen2VL"),
    FamilyRecord(("qwen2_5_vl",), media=f"{_MEDIA}.qwen_vl:Qwen25VL"),
    FamilyRecord(("qwen3_vl", "qwen3_vl_moe"), media=f"{_MEDIA}.qwen_vl:Qwen3VL"),
    FamilyRecord(("qwen2_audio",), loss_in_forward=True, media=f"{_MEDIA}.qwen_audio:Qwen2Audio"),
    FamilyRecord(("qwen2_audio_encoder",), padded_audio=True),
    FamilyRecord(("qwen2_5_omni",), thinker="qwen2_5_omni_thinker"),
    FamilyRecord(("qwen2_5_omni_thinker",), unread=("audio_bos_eos_token.",), media=f"{_MEDIA}.qwen_omni:Qwen25Omni"),
    FamilyRecord(("qwen2_5_omni_audio_encoder", "qwen3_omni_moe_audio_encoder"), audio_seconds=300),
    FamilyRecord(("qwen3_omni_moe",), thinker="qwen3_omni_moe_thinker"),
    FamilyRecord(("qwen3_omni_moe_thinker",), media=f"{_MEDIA}.qwen_omni:Qwen3Omni"),
)
RECORDS = {model_type: family for family in _ALL for model_type in family.model_types}
"""Model type to its family; a model that needs no record has none."""


def register_family(record: FamilyRecord) -> None:
    """Add a family, or replace the record of its model types."""
    RECORDS.update(dict.fromkeys(record.model_types, record))


def family_record(config: Any) -> FamilyRecord:
    """Return the family of a configuration, or of a model type by its name; one without differences for others."""
    model_type = config if isinstance(config, str) else getattr(config, "model_type", "")
    return RECORDS.get(model_type, FamilyRecord((model_type,)))
