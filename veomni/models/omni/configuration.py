"""What a composed model is made of, as data."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from veomni.models.loader import config_class


class OmniConfig(PreTrainedConfig):
    """Encoders, a foundation and decoders.

    Args:
        text_config: The language foundation's configuration, or its values with a ``model_type``.
        vision_config: The image encoder's; None for none.
        audio_config: The audio encoder's; None for none.
        decoders: Name of a decoder (``veomni.models.omni.DECODERS``) to its values.
        image_token_id: The placeholder of image features.
        audio_token_id: The placeholder of audio features.
        kwargs: ``codes_token_id`` and so on, the placeholder of each decoder, where conversations are to be read; and
            what every configuration has.
    """

    model_type = "omni"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = dict.fromkeys(
        ("text_config", "vision_config", "audio_config"), PreTrainedConfig
    )

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        audio_config: Any = None,
        decoders: dict[str, dict[str, Any]] | None = None,
        image_token_id: int | None = None,
        audio_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_config = _part({"model_type": "qwen3"} if text_config is None else text_config)
        self.vision_config, self.audio_config = _part(vision_config), _part(audio_config)
        self.decoders = decoders or {}
        self.image_token_id, self.audio_token_id = image_token_id, audio_token_id
        super().__init__(**kwargs)


def _part(values: Any) -> Any:
    if values is None or not isinstance(values, dict):
        return values
    return config_class(values["model_type"]).from_dict(values)
