"""VeOmni: PyTorch-native components for training language, vision-language and omni models, without a trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from veomni.version import __version__

if TYPE_CHECKING:
    from veomni.config import Config, load_config, save_args
    from veomni.data import build_dataloader, build_dataset
    from veomni.launch import entrypoint
    from veomni.launcher import Launcher
    from veomni.logging import create_logger
    from veomni.loop.checkpoint_schedule import CheckpointSchedule
    from veomni.loop.reporter import Reporter
    from veomni.models import build_config, build_model, build_processor, build_tokenizer
    from veomni.optim import build_scheduler
    from veomni.parallel.mesh import ParallelDims, get_parallel_state

# Importing a name imports its module, and nothing before that: `import veomni` stays as cheap as `import torch`.
_HOMES = {
    "CheckpointSchedule": "veomni.loop.checkpoint_schedule",
    "Config": "veomni.config",
    "Launcher": "veomni.launcher",
    "ParallelDims": "veomni.parallel.mesh",
    "Reporter": "veomni.loop.reporter",
    "build_config": "veomni.models",
    "build_dataloader": "veomni.data",
    "build_dataset": "veomni.data",
    "build_model": "veomni.models",
    "build_processor": "veomni.models",
    "build_scheduler": "veomni.optim",
    "build_tokenizer": "veomni.models",
    "create_logger": "veomni.logging",
    "entrypoint": "veomni.launch",
    "get_parallel_state": "veomni.parallel.mesh",
    "load_config": "veomni.config",
    "save_args": "veomni.config",
}

__all__ = [
    "CheckpointSchedule",
    "Config",
    "Launcher",
    "ParallelDims",
    "Reporter",
    "__version__",
    "build_config",
    "build_dataloader",
    "build_dataset",
    "build_model",
    "build_processor",
    "build_scheduler",
    "build_tokenizer",
    "create_logger",
    "entrypoint",
    "get_parallel_state",
    "load_config",
    "save_args",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'veomni' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
