"""Models on the meta device, from a name, a directory or a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from veomni.errors import ModelError
from veomni.logging import create_logger
from veomni.models.transformers_api.attention import attention_names
from veomni.models.transformers_api.capabilities import caps_scores, is_pretrained, set_config_flag, supports_sdpa
from veomni.models.transformers_api.construction import construct
from veomni.models.build.attention import attention_name
from veomni.models.build.config import build_config, find_directory
from veomni.models.build.constructor import registered_on_meta
from veomni.models.loader import model_class
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.adapter.passes.documents import isolate_documents
from veomni.models.weights.safetensors_files import has_safetensors, require_safetensors
from veomni.models.weights.source import WeightSource
from veomni.ops.attention.backends import AttentionBackend
from veomni.ops.attention.varlen import register_attention
from veomni.registry import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = create_logger(__name__)


def build_model(
    source: str | Path | PreTrainedConfig,
    *,
    overrides: Mapping[str, Any] | None = None,
    attention: str | AttentionBackend = "auto",
    experts: str = "auto",
    weights: str | Path = "auto",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Return a model in float32 on the meta device; :class:`~veomni.models.Materializer` gives it its values.

    Args:
        source: What :func:`~veomni.models.build_config` takes, or a configuration.
        overrides: Configuration values that replace those of the source.
        attention: A backend, or transformers' name of one; "auto" is "sdpa" where the model supports it.
        experts: Backend of mixture-of-experts layers; "auto" takes the device's fastest one that can run them.
        weights: "auto" takes the source's own safetensors where it has some and random weights otherwise; "random"; or
            a directory with safetensors.
        trust_remote_code: Run the Python files that a model directory brings along.

    Raises:
        ModelError: see :func:`~veomni.models.build_config`; or the weights are missing, or only pickle; or the
            attention is unknown or not supported by the model.
    """
    attention = attention_name(attention)
    if isinstance(source, str | Path):
        config = build_config(source, overrides, trust_remote_code=trust_remote_code)
        directory = find_directory(source)
    else:
        config, directory = source, None
        set_config_flag(config, "use_cache", False)
    composed = hasattr(config, "decoders") and config.model_type == "omni"
    parts = weight_parts(weights, directory) if composed else {}
    origin = None if composed else _weight_directory(weights, directory)
    _check_quantisation(config, origin)
    with torch.device("meta"):
        model = _construct(config, attention, trust_remote_code)
    adapter = ModelAdapter.of(model)
    if attention == "auto":
        adapter.attention_open = True
    adapter.experts = experts
    isolate_documents(model)
    if origin is not None:
        _take_generation_config(model, origin)
    adapter.weight_source = WeightSource(origin, parts)
    return model


def _weight_directory(weights: str | Path, directory: Path | None) -> Path | None:
    if weights == "random":
        return None
    if weights == "auto":
        if directory is None or has_safetensors(directory):
            return directory
        if any(directory.glob("*.bin")):
            require_safetensors(directory)
        logger.info_rank0("%s holds no weights: the model starts from random ones", directory)
        return None
    chosen = find_directory(weights)
    if chosen is None:
        raise ModelError(f"{weights} is no directory", "give a directory with safetensors, 'auto' or 'random'")
    if not has_safetensors(chosen):
        require_safetensors(chosen)
    return chosen


def weight_parts(weights: str | Path, directory: Path | None) -> dict[str, Path]:
    """Return the parts of a composed model that a directory has weights of, by name; ``weights`` is build_model's."""
    chosen = directory if weights == "auto" else None if weights == "random" else find_directory(weights)
    if chosen is None:
        if weights not in ("auto", "random"):
            raise ModelError(f"{weights} is no directory", "give a composed model's, 'auto' or 'random'")
        return {}
    found = sorted({path.parent for path in chosen.glob("**/*.safetensors")})
    return {".".join(path.relative_to(chosen).parts): path for path in found if path != chosen}


def _check_quantisation(config: PreTrainedConfig, origin: Path | None) -> None:
    method = getattr(config, "quantization_config", None)
    if origin is not None and method is not None:
        raise ModelError(
            f"{origin} holds quantised weights", "dequantise them first: load with transformers, then save_pretrained"
        )


def _construct(config: PreTrainedConfig, attention: str, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM, PreTrainedModel

    if trust_remote_code and getattr(config, "auto_map", None):
        remote: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
        return remote
    cls = model_class(config)
    if not issubclass(cls, PreTrainedModel):
        return cls(config)
    return _construct_pretrained(cls, config, attention)


def _construct_pretrained(cls: type[PreTrainedModel], config: PreTrainedConfig, attention: str) -> nn.Module:
    if attention == "auto":
        attention = "sdpa" if supports_sdpa(cls) and not caps_scores(config) else "eager"
        if attention == "eager":
            logger.info_rank0("%s does not support sdpa attention: eager is used", cls.__name__)
    register_attention()
    if attention not in attention_names():
        fix = did_you_mean(attention, attention_names())
        raise ModelError(f"no attention is called {attention!r}", fix, "build_model.attention")
    if attention == "sdpa" and caps_scores(config):
        problem = f"{cls.__name__} caps its attention scores, which sdpa cannot"
        raise ModelError(problem, 'use attention="auto"', "build_model.attention")
    config.architectures = [cls.__name__]  # an export, and whatever rebuilds the model from its config, needs the class
    try:
        with registered_on_meta():
            return construct(cls, config, attention)
    except (ValueError, ImportError, AttributeError, KeyError, TypeError, RuntimeError) as error:
        said = str(error).partition("\n")[0]  # AutoModel goes on with the name of every configuration there is
        raise ModelError(f"{cls.__name__} cannot be built: {said}", "correct its configuration") from error


def _take_generation_config(model: nn.Module, directory: Path) -> None:
    """Keep the generation defaults that a checkpoint brings, so that an export has them too."""
    from transformers import GenerationConfig

    if is_pretrained(model) and (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)  # type: ignore[assignment]
