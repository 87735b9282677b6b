"""A small valid configuration to spoil."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from veomni.run_config import Config

REPOSITORY = Path(__file__).parents[2]
TINY_MODEL = str(REPOSITORY / "configs/model_configs/tiny_qwen3.json")
VALUES: dict[str, Any] = {
    "model": {"config_path": TINY_MODEL, "train_tokenizer_vocab_size": 512},
    "data": {"train_path": "python-stdlib", "max_seq_len": 64},
    "train": {"global_batch_size": 8, "output_dir": "out", "precision": "fp32"},
}


def values(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the values with some replaced, by dotted key."""
    result = copy.deepcopy(VALUES)
    for key, value in (changes or {}).items():
        *groups, last = key.split(".")
        target = result
        for group in groups:
            target = target.setdefault(group, {})
        target[last] = value
    return result


def config(**changes: Any) -> Config:
    """Return the configuration; ``train__devices=2`` replaces ``train.devices``."""
    return Config.model_validate(values({key.replace("__", "."): value for key, value in changes.items()}))


def write(path: Path, changes: dict[str, Any] | None = None) -> Path:
    """Write the values to a file and return its path."""
    path.write_text(yaml.safe_dump(values(changes)))
    return path
