"""Models composed from encoders, a language foundation and decoders; registered under the model type ``omni``."""

from __future__ import annotations

from typing import Any

from veomni.models.loader import MODEL_CONFIG_REGISTRY, MODELING_REGISTRY
from veomni.models.omni.build import build_omni_model
from veomni.models.omni.decoders import DECODERS, Decoder
from veomni.models.omni.encoders import ENCODERS, Encoder


@MODEL_CONFIG_REGISTRY.register("omni")
def _config() -> type[Any]:
    from veomni.models.omni.configuration import OmniConfig

    return OmniConfig


@MODELING_REGISTRY.register("omni")
def _model(architecture: str | None) -> type[Any]:
    from veomni.models.omni.modeling import OmniModel

    return OmniModel


__all__ = ["DECODERS", "ENCODERS", "Decoder", "Encoder", "build_omni_model"]
