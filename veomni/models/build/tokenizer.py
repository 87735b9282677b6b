"""Tokenizers and processors of a local model directory."""

from pathlib import Path
from typing import Any

from veomni.errors import ModelError
from veomni.models.build.config import build_config, find_directory
from veomni.models.loader import MODEL_PROCESSOR_REGISTRY


def build_tokenizer(path: str | Path) -> Any:
    """Return the tokenizer of a model directory, or of a hub name in the local cache; a ModelError without one."""
    from transformers import AutoTokenizer

    directory = _directory(path)
    tokenizer = _load(AutoTokenizer, directory, "tokenizer")
    # Without files, transformers makes one of the class that config.json names, with special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(f"{directory} holds no tokenizer with a vocabulary", "save the tokenizer there first")
    return tokenizer


def build_processor(path: str | Path) -> Any:
    """Return the processor of a multimodal model directory, a registered one first; a ModelError without one."""
    from transformers import AutoProcessor

    directory, loader = _directory(path), AutoProcessor
    if (directory / "config.json").is_file() and len(MODEL_PROCESSOR_REGISTRY):
        model_type = build_config(directory).model_type
        if model_type in MODEL_PROCESSOR_REGISTRY:
            loader = MODEL_PROCESSOR_REGISTRY.get(model_type)()
    return _load(loader, directory, "processor")


def _directory(path: str | Path) -> Path:
    directory = find_directory(path)
    if directory is None:
        raise ModelError(f"{path} is no directory", "give the directory that holds the tokenizer's files")
    return directory


def _load(loader: Any, directory: Path, what: str) -> Any:
    try:
        return loader.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the loaders raise many kinds, OSError and ValueError most of all
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{directory} holds no usable {what}: {reason}", f"save the {what} there first") from error
