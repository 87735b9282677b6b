"""The configuration of a run: schema, YAML file, command line, and what is checked before anything starts."""

from veomni.config.config import Config, load_config
from veomni.config.data import BUILTIN_CORPORA, DataConfig
from veomni.config.layout import check_layout
from veomni.config.model import ModelConfig
from veomni.config.paths import check_paths
from veomni.config.save import save_args
from veomni.config.train import TrainConfig

__all__ = [
    "BUILTIN_CORPORA",
    "Config",
    "DataConfig",
    "ModelConfig",
    "TrainConfig",
    "check_layout",
    "check_paths",
    "load_config",
    "save_args",
]
