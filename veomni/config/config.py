"""The whole configuration, from a file and overrides to checked values."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from veomni.config.base import Section
from veomni.config.consistency import consistency_problems
from veomni.config.data import DataConfig
from veomni.config.keys import walk
from veomni.config.model import ModelConfig
from veomni.config.overrides import USAGE, apply_overrides, parse_argv
from veomni.config.paths import check_paths
from veomni.config.problems import explain, raise_problems
from veomni.config.train import TrainConfig
from veomni.config.yaml_file import read_yaml


class Config(Section):
    """Everything that decides a run."""

    model: ModelConfig = Field(description="Which architecture, which weights, which tokenizer.")
    data: DataConfig = Field(description="What is read and how it becomes rows.")
    train: TrainConfig = Field(description="Layout, arithmetic, length and outputs of the run.")

    @classmethod
    def from_file(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
        """Return the configuration in a YAML file, with overrides applied and the keys checked against each other.

        Files and directories that it names are not looked at.

        Args:
            path: The YAML file.
            overrides: Values by dotted key, such as ``{"train.max_steps": 20}``.

        Raises:
            ConfigError: naming every key that is wrong, where it was given, and the fix.
        """
        values, lines = read_yaml(path)
        places = {".".join(key): f"{path}:{line}" for key, line in lines.items()}
        places |= {key: f"--{key}" for key in overrides or {}}
        try:
            config = cls.model_validate(apply_overrides(values, overrides or {}))
        except ValidationError as error:
            raise_problems(explain(error, cls, places), str(path))
            raise
        raise_problems(consistency_problems(config.model, config.data, config.train), str(path))
        return config


def load_config(argv: Sequence[str]) -> Config:
    """Return the configuration that a training script's command line asks for; ``--help`` prints all keys and exits.

    Args:
        argv: ``sys.argv[1:]``: a YAML file and any number of ``--section.key VALUE`` or ``--section.key=VALUE``.
            Values are YAML: ``1e-4``, ``true``, ``null``, ``[0.9, 0.95]``; other text goes in quotes.

    Raises:
        ConfigError: naming everything that is wrong, and the fix; also when a file or directory it names is not there.
    """
    if "--help" in argv or "-h" in argv:
        print(_help())
        sys.exit(0)
    path, overrides = parse_argv(argv)
    config = Config.from_file(path, overrides)
    check_paths(config.model, config.data, config.train)
    return config


def _help() -> str:
    keys = (f"  --{key}\n      {field.description}" for key, field in walk(Config) if "." in key)
    return "\n".join((f"usage: {USAGE}", "", *keys))
