"""Files and directories that a configuration names: there, readable, writable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from veomni.config.data import BUILTIN_CORPORA, DataConfig
from veomni.config.model import ModelConfig
from veomni.config.problems import Problem, raise_problems
from veomni.config.train import TrainConfig


def check_paths(model: ModelConfig, data: DataConfig, train: TrainConfig) -> None:
    """Check everything on disk that a run is about to use; nothing is written.

    Raises:
        ConfigError: naming every key whose file or directory is missing or cannot be used.
    """
    raise_problems(_problems(model, data, train), "the configuration")


def _problems(model: ModelConfig, data: DataConfig, train: TrainConfig) -> Iterator[Problem]:
    yield from _model(model)
    named = {"data.train_path": data.train_path, "data.eval_path": data.eval_path}
    for number, source in enumerate(data.sources):
        named |= {f"data.sources.{number}.path": source.path, f"data.sources.{number}.eval_path": source.eval_path}
    for key, given in named.items():
        for path in [given] if isinstance(given, str) else given or []:
            if path not in BUILTIN_CORPORA and not ("://" in path and not path.startswith("file://")):
                yield from _exists(key, path.removeprefix("file://"))
    yield from _writable("train.output_dir", train.output_dir)
    if data.cache_dir is not None:
        yield from _writable("data.cache_dir", data.cache_dir)
    if train.checkpoint.resume not in ("auto", "none"):
        yield from _directory("train.checkpoint.resume", train.checkpoint.resume, "auto or none also work")


def _model(model: ModelConfig) -> Iterator[Problem]:
    if model.model_path is not None and not _is_cached(model.model_path):
        yield from _directory("model.model_path", model.model_path, "it holds config.json and *.safetensors")
    if model.tokenizer_path is not None and not _is_cached(model.tokenizer_path):
        yield from _directory("model.tokenizer_path", model.tokenizer_path, "it holds the tokenizer's files")
    path = model.config_path
    if path is not None and (os.sep in path or path.endswith(".json")) and not _is_cached(path):
        yield from _exists("model.config_path", path)
    ready = (model.tokenizer_path, model.model_path, model.train_tokenizer_vocab_size)
    if ready == (None, None, None) and not os.path.isdir(path or "") and not _is_cached(path or ""):
        yield Problem(
            "no key says where the tokenizer comes from",
            "set model.tokenizer_path, model.model_path or model.train_tokenizer_vocab_size",
        )


def _is_cached(name: str) -> bool:
    """Whether ``name`` is that of a hub model in the local Hugging Face cache."""
    if os.path.exists(name) or name.count("/") != 1 or name.startswith((".", "/")) or name.endswith("/"):
        return False
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _exists(key: str, path: str) -> Iterator[Problem]:
    if not os.path.exists(path):
        yield Problem(f"{key}: {path} does not exist", _fix(key, path))
    elif not os.access(path, os.R_OK):
        yield Problem(f"{key}: {path} cannot be read by this user", f"change its permissions, or --{key}")


def _directory(key: str, path: str, hint: str) -> Iterator[Problem]:
    if os.path.isfile(path):
        yield Problem(f"{key}: {path} is a file", f"give the directory ({hint})")
    elif not os.path.isdir(path):
        yield Problem(f"{key}: {path} does not exist", f"{_fix(key, path)}; {hint}")


def _fix(key: str, path: str) -> str:
    where = "" if os.path.isabs(path) else f" (relative to {os.getcwd()})"
    return f"give --{key} a path that does{where}"


def _writable(key: str, path: str) -> Iterator[Problem]:
    if "://" in path:
        yield Problem(f"{key}: {path} is not a local path", "give a directory of a mounted file system")
        return
    present = Path(path).absolute()
    while not os.path.lexists(present):
        present = present.parent
    if not present.is_dir():
        yield Problem(f"{key}: {present} is not a directory", f"give --{key} another path")
    elif not os.access(present, os.W_OK | os.X_OK):
        yield Problem(f"{key}: {present} cannot be written to by this user", f"give --{key} another path")
