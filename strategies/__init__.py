"""Strategies: where parameters, gradients and samples live. Objects that people pass to a launcher."""

from veomni.strategies.base import ParameterStrategy, SetupContext, Strategy
from veomni.strategies.ddp import DDP
from veomni.strategies.fsdp1 import FSDP1
from veomni.strategies.fsdp2 import FSDP2
from veomni.strategies.sequence.context_parallel import ContextParallel
from veomni.strategies.sequence.ulysses import Ulysses
from veomni.strategies.single import Single

__all__ = [
    "DDP",
    "FSDP1",
    "FSDP2",
    "ContextParallel",
    "ParameterStrategy",
    "SetupContext",
    "Single",
    "Strategy",
    "Ulysses",
]
