"""Model configurations from a name, a file or a directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veomni.errors import ModelError
from veomni.families.record import family_record
from veomni.logging import create_logger
from veomni.models.loader import config_class
from veomni.models.transformers_api.capabilities import set_config_flag
from veomni.registry import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = create_logger(__name__)

_NOT_DATA = (
    "trust_remote_code", "_attn_implementation", "_attn_implementation_internal", "attn_implementation",
    "_experts_implementation", "_experts_implementation_internal", "experts_implementation",
)  # fmt: skip


def build_config(
    source: str | Path, overrides: Mapping[str, Any] | None = None, *, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Return a model configuration for training (without a key-value cache).

    Args:
        source: A directory with a ``config.json``, a JSON file, the hub name of a model in the local cache, or a model
            type: registered, or one of transformers' (then its defaults).
        overrides: Values that replace those of the source; nested for nested configurations.
        trust_remote_code: Run the Python files that a model directory brings along.

    Raises:
        ModelError: the source is missing, no configuration, names code or an unknown type; or lacks an overridden key.
    """
    directory = find_directory(source)
    path = directory / "config.json" if directory is not None else Path(source)
    overrides = dict(overrides or {})
    if directory is not None or path.suffix == ".json":
        config = _from_values(_read(path), overrides, path, trust_remote_code)
    elif len(path.parts) > 1 or str(source).startswith((".", "~")):
        raise ModelError(f"{source} is no model directory", "give a directory with a config.json; download it first")
    else:
        config = _construct(config_class(family_record(str(source)).thinker or str(source)), {}, overrides, str(source))
    set_config_flag(config, "use_cache", False)
    return config


def find_directory(source: str | Path) -> Path | None:
    """Return the directory that ``source`` names, itself or a snapshot in the local Hugging Face cache."""
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(source, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return None
    return None


def _read(path: Path) -> dict[str, Any]:
    """Return the values of a configuration file; of a model with a thinker and a talker, the thinker's."""
    if not path.is_file():
        raise ModelError(f"there is no {path}", "give a model directory, a config file or a model type")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}", "correct the file") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ModelError(f"{path} names no model_type", "give a model's config.json")
    thinker = family_record(values["model_type"]).thinker
    if thinker is None:
        return values
    logger.info_rank0("%s: the thinker is built, without talker and speech decoder", path)
    return {**values.get("thinker_config", {}), "model_type": thinker}


def _from_values(
    values: dict[str, Any], overrides: dict[str, Any], path: Path, trust_remote_code: bool
) -> PreTrainedConfig:
    _check_no_orders(values, path)
    if trust_remote_code and "auto_map" in values:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(path.parent, trust_remote_code=True, **overrides)
    model_type = values["model_type"]
    brings_code = values.pop("auto_map", None) is not None
    try:
        cls = config_class(model_type)
    except ModelError as error:
        if not brings_code:
            raise
        problem = f"{path} brings its own code (auto_map) and {error.problem}"
        raise ModelError(problem, "read that code, then pass trust_remote_code=True") from error
    if brings_code:
        logger.info_rank0("%s: auto_map is ignored, transformers' own %s is used", path, model_type)
    config = _construct(cls, values, overrides, str(path))
    config.name_or_path = str(path.parent)
    return config


def _check_no_orders(values: Any, path: Path) -> None:
    """Reject keys that choose code instead of describing a model; only the caller may choose code."""
    for key, value in values.items():
        if key in _NOT_DATA and value is not None:
            raise ModelError(f"{path} sets {key}, which only the caller may choose", f"remove {key} from the file")
        if isinstance(value, dict):
            _check_no_orders(value, path)


def _construct(cls: type[Any], values: dict[str, Any], overrides: dict[str, Any], source: str) -> PreTrainedConfig:
    try:
        merged = _merge(values, overrides, cls(), source) if overrides else values
        config: PreTrainedConfig = cls.from_dict(merged) if values else cls(**merged)
    except ModelError:
        raise
    except Exception as error:  # configuration classes validate themselves, with exceptions of many kinds
        raise ModelError(f"{source}: {error}", "correct the values, or the overrides of them") from error
    return config


def _merge(values: dict[str, Any], overrides: Mapping[str, Any], defaults: Any, source: str) -> dict[str, Any]:
    """Return ``values`` with ``overrides`` on top, rejecting keys that neither the file nor the class has."""
    known = {*values, *defaults.to_dict(), *defaults.attribute_map} - {"model_type", "transformers_version"}
    merged = dict(values)
    for key, value in overrides.items():
        if key not in known:
            raise ModelError(f"{source} has no key {key!r}", did_you_mean(key, sorted(known)))
        part = getattr(defaults, key, None)
        if isinstance(value, Mapping) and hasattr(part, "attribute_map"):
            value = _merge(values.get(key) or {}, value, part, f"{source}: {key}")
        merged[defaults.attribute_map.get(key, key) if key not in values else key] = value
    return merged
