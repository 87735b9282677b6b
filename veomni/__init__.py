"""VeOmni: PyTorch-native components for training language, vision-language and omni models, without a trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from veomni.version import __version__

if TYPE_CHECKING:
    from veomni.data import build_dataloader, build_dataset
    from veomni.launch import entrypoint
    from veomni.launcher import Launcher
    from veomni.logging import create_logger
    from veomni.loop.checkpoint_schedule import CheckpointSchedule
    from veomni.loop.reporter import Reporter
    from veomni.loop.sample import show_sample
    from veomni.models import build_config, build_model, build_processor, build_tokenizer
    from veomni.optim import build_scheduler
    from veomni.parallel.mesh import ParallelDims, get_parallel_state
    from veomni.run_config import Config, load_config, save_args
    from veomni.strategies import DDP, FSDP1, FSDP2, ContextParallel, Single, Ulysses

# Importing a name imports its module, and nothing before that: `import veomni` stays as cheap as `import torch`.
_HOMES = {
    "CheckpointSchedule": "veomni.loop.checkpoint_schedule",
    "Config": "veomni.run_config",
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
    "load_config": "veomni.run_config",
    "save_args": "veomni.run_config",
    "show_sample": "veomni.loop.sample",
    **dict.fromkeys(("DDP", "FSDP1", "FSDP2", "ContextParallel", "Single", "Ulysses"), "veomni.strategies"),
}
_MODULES = ("accelerators", "data", "loggers", "models", "moe", "optim", "strategies", "testing")

__all__ = [
    "DDP",
    "FSDP1",
    "FSDP2",
    "CheckpointSchedule",
    "Config",
    "ContextParallel",
    "Launcher",
    "ParallelDims",
    "Reporter",
    "Single",
    "Ulysses",
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
    "show_sample",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"veomni.{name}")
    if name not in _HOMES:
        from veomni.registry import did_you_mean

        hint = "" if name.startswith("__") else f"; {did_you_mean(name, [*_HOMES, *_MODULES])}"
        raise AttributeError(f"module 'veomni' has no attribute {name!r}{hint}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
