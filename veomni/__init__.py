"""VeOmni: PyTorch-native components for training language, vision-language and omni models, without a trainer."""

import importlib
from typing import TYPE_CHECKING, Any

from veomni.version import __version__ as __version__

if TYPE_CHECKING:
    from veomni.data import build_dataloader as build_dataloader
    from veomni.data import build_dataset as build_dataset
    from veomni.launch import entrypoint as entrypoint
    from veomni.launcher import Launcher as Launcher
    from veomni.logging import create_logger as create_logger
    from veomni.loop.checkpoint_schedule import CheckpointSchedule as CheckpointSchedule
    from veomni.loop.profile import Profile as Profile
    from veomni.loop.reporter import Reporter as Reporter
    from veomni.loop.sample import show_sample as show_sample
    from veomni.models import build_config as build_config
    from veomni.models import build_model as build_model
    from veomni.models import build_processor as build_processor
    from veomni.models import build_tokenizer as build_tokenizer
    from veomni.optim import build_scheduler as build_scheduler
    from veomni.parallel.mesh import ParallelDims as ParallelDims
    from veomni.parallel.mesh import get_parallel_state as get_parallel_state
    from veomni.run_config import Config as Config
    from veomni.run_config import load_config as load_config
    from veomni.run_config import save_args as save_args
    from veomni.strategies import DDP as DDP
    from veomni.strategies import FSDP1 as FSDP1
    from veomni.strategies import FSDP2 as FSDP2
    from veomni.strategies import ContextParallel as ContextParallel
    from veomni.strategies import Single as Single
    from veomni.strategies import Ulysses as Ulysses

# Importing a name imports its module, and nothing before that: `import veomni` stays as cheap as `import torch`.
_NAMES = {
    "veomni.data": "build_dataloader build_dataset",
    "veomni.launch": "entrypoint",
    "veomni.launcher": "Launcher",
    "veomni.logging": "create_logger",
    "veomni.loop.checkpoint_schedule": "CheckpointSchedule",
    "veomni.loop.profile": "Profile",
    "veomni.loop.reporter": "Reporter",
    "veomni.loop.sample": "show_sample",
    "veomni.models": "build_config build_model build_processor build_tokenizer",
    "veomni.optim": "build_scheduler",
    "veomni.parallel.mesh": "ParallelDims get_parallel_state",
    "veomni.run_config": "Config load_config save_args",
    "veomni.strategies": "DDP FSDP1 FSDP2 ContextParallel Single Ulysses",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
_MODULES = ("accelerators", "data", "loggers", "models", "moe", "optim", "strategies", "testing")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"veomni.{name}")
    if name not in _HOMES:
        from veomni.registry import did_you_mean

        hint = "" if name.startswith("__") else f"; {did_you_mean(name, [*_HOMES, *_MODULES])}"
        raise AttributeError(f"module 'veomni' has no attribute {name!r}{hint}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(["__version__", *_HOMES, *_MODULES])
