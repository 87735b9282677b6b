"""Models on the meta device, from a name, a directory or a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from veomni.errors import ModelError
from veomni.logging import create_logger
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.adapter.passes.documents import isolate_documents
from veomni.models.build.config import build_config, find_directory
from veomni.models.build.constructor import registered_on_meta
from veomni.models.loader import model_class
from veomni.models.transformers_api.capabilities import caps_scores, is_pretrained, set_config_flag, supports_sdpa
from veomni.models.transformers_api.construction import construct
from veomni.models.weights.safetensors_files import has_safetensors, require_safetensors
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
        ModelError: as of build_config; the weights are missing or only pickle; the attention is unknown or unsupported.
    """
    if isinstance(source, str | Path):
        config = build_config(source, overrides, trust_remote_code=trust_remote_code)
        directory = find_directory(source)
    else:
        config, directory = source, None
        set_config_flag(config, "use_cache", False)
    composed = hasattr(config, "decoders") and config.model_type == "omni"
    directories = _weight_directories(weights, directory, composed)
    if directories and getattr(config, "quantization_config", None) is not None:
        problem = f"{directories.get('', directory)} holds quantised weights"
        raise ModelError(problem, "dequantise them first: load with transformers, then save_pretrained")
    attention = attention if isinstance(attention, str) else _registered(attention)
    with torch.device("meta"):
        model: Any = _construct(config, attention, trust_remote_code)
    adapter = ModelAdapter.of(model)
    adapter.attention_open = attention == "auto"
    adapter.experts, adapter.weights = experts, directories
    isolate_documents(model)
    if is_pretrained(model) and "" in directories and (directories[""] / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(directories[""])  # an export has it too
    return model


def _weight_directories(weights: str | Path, own: Path | None, composed: bool) -> dict[str, Path]:
    """Return the directories with weights by the part of the model, "" for all of it; ``weights`` is build_model's."""
    if weights == "random" or (weights == "auto" and own is None):
        return {}
    directory = own if weights == "auto" else find_directory(weights)
    if directory is None:
        raise ModelError(f"{weights} is no directory", "give a directory with safetensors, 'auto' or 'random'")
    if composed:
        found = sorted({path.parent for path in directory.glob("**/*.safetensors")} - {directory})
        return {".".join(path.relative_to(directory).parts): path for path in found}
    if weights == "auto" and not has_safetensors(directory) and not any(directory.glob("*.bin")):
        logger.info_rank0("%s holds no weights: the model starts from random ones", directory)
        return {}
    require_safetensors(directory)
    return {"": directory}


def _registered(backend: AttentionBackend) -> str:
    """Register the function that a backend brings with transformers, and return the attention's name there."""
    if backend.function is not None:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(backend.name, backend.function)
        AttentionMaskInterface.register(backend.name, AttentionMaskInterface()[backend.mask])
    return backend.name


def _construct(config: PreTrainedConfig, attention: str, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM, PreTrainedModel

    if trust_remote_code and getattr(config, "auto_map", None):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    cls = model_class(config)
    return _construct_pretrained(cls, config, attention) if issubclass(cls, PreTrainedModel) else cls(config)


def _construct_pretrained(cls: type[PreTrainedModel], config: PreTrainedConfig, attention: str) -> nn.Module:
    from transformers import AttentionInterface

    if attention == "auto":
        attention = "sdpa" if supports_sdpa(cls) and not caps_scores(config) else "eager"
        if attention == "eager":
            logger.info_rank0("%s does not support sdpa attention: eager is used", cls.__name__)
    register_attention()
    known = ["eager", *AttentionInterface().valid_keys()]
    if attention not in known:
        fix = did_you_mean(attention, known)
        raise ModelError(f"no attention is called {attention!r}", fix, "build_model.attention")
    if attention == "sdpa" and caps_scores(config):
        problem = f"{cls.__name__} caps its attention scores, which sdpa cannot"
        raise ModelError(problem, 'use attention="auto"', "build_model.attention")
    config.architectures = [cls.__name__]  # an export, and whatever rebuilds the model from its config, needs the class
    try:
        with registered_on_meta():
            return construct(cls, config, attention)
    except (ArithmeticError, ValueError, ImportError, AttributeError, LookupError, TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]  # the other lines list every configuration there is
        raise ModelError(f"{cls.__name__} cannot be built: {reason}", "correct its configuration") from error
