"""What a composed model is made of, as data, and one put together from parts that exist already."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedConfig

from veomni.errors import ModelError
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.build.config import build_config, find_directory
from veomni.models.build.model import build_model
from veomni.models.loader import config_class
from veomni.models.weights.safetensors_files import has_safetensors


class OmniConfig(PreTrainedConfig):
    """Encoders, a foundation and decoders.

    The first three are the configurations of the language foundation and the encoders, or their values with a
    ``model_type``. ``decoders`` maps names in ``veomni.families.omni.DECODERS`` to their values. The ids are those of
    the placeholders of features; each decoder has one, too (``codes_token_id``), where conversations are to be read.
    """

    model_type = "omni"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = dict.fromkeys(
        ("text_config", "vision_config", "audio_config"), PreTrainedConfig
    )

    def __init__(
        self, text_config: Any = None, vision_config: Any = None, audio_config: Any = None,
        decoders: dict[str, dict[str, Any]] | None = None, image_token_id: int | None = None,
        audio_token_id: int | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.text_config = _part({"model_type": "qwen3"} if text_config is None else text_config)
        self.vision_config, self.audio_config = _part(vision_config), _part(audio_config)
        self.decoders = decoders or {}
        self.image_token_id, self.audio_token_id = image_token_id, audio_token_id
        super().__init__(**kwargs)


def _part(values: Any) -> Any:
    return config_class(values["model_type"]).from_dict(values) if isinstance(values, dict) else values


def build_omni_model(
    foundation: str | Path, *, image_encoder: str | Path | None = None, audio_encoder: str | Path | None = None,
    decoders: Mapping[str, Mapping[str, Any]] | None = None, image_token_id: int | None = None,
    audio_token_id: int | None = None, attention: str = "auto",
) -> nn.Module:  # fmt: skip
    """Return a composed model on the meta device; its parts take the weights of their directories, if these have any.

    The foundation, a causal language model, and the encoders, of a type in ``ENCODERS``, are what
    :func:`~veomni.models.build_config` takes; of a model with text and images take the part. The other arguments are
    those of :class:`OmniConfig` and :func:`~veomni.models.build_model`.

    ModelError where an encoder has no placeholder, or a part cannot be built.
    """
    sources = {"foundation": foundation, "image_encoder": image_encoder, "audio_encoder": audio_encoder}
    given = {name: source for name, source in sources.items() if source is not None}
    configs = {name: build_config(source) for name, source in given.items()}
    for name, token in (("image_encoder", image_token_id), ("audio_encoder", audio_token_id)):
        if name in given and token is None:
            raise ModelError(f"the {name} was given no placeholder token", f"set {name.split('_')[0]}_token_id")
    values = {name: dict(options) for name, options in (decoders or {}).items()}
    parts = (configs["foundation"], configs.get("image_encoder"), configs.get("audio_encoder"))
    config = OmniConfig(*parts, values, image_token_id, audio_token_id)
    model = build_model(config, attention=attention, weights="random")
    directories = {name: find_directory(source) for name, source in given.items()}
    adapter = ModelAdapter.of(model)
    adapter.weights = {name: path for name, path in directories.items() if path is not None and has_safetensors(path)}
    return model
