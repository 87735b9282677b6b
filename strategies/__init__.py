"""Strategies: where parameters, gradients and samples live. Objects that people pass to a launcher."""

from veomni.strategies.base import ParameterStrategy, SetupContext, Stage, Strategy
from veomni.strategies.ddp import DDP
from veomni.strategies.expert_parallel import ExpertParallel
from veomni.strategies.fsdp1 import FSDP1
from veomni.strategies.fsdp2 import FSDP2
from veomni.strategies.sequence.context_parallel import ContextParallel
from veomni.strategies.sequence.ulysses import Ulysses
from veomni.strategies.single import Single
from veomni.strategies.transforms.activation_checkpointing import ActivationCheckpointing
from veomni.strategies.transforms.compile import Compile
from veomni.strategies.transforms.encoder_balance import EncoderBalance

__all__ = [
    "DDP",
    "FSDP1",
    "FSDP2",
    "ActivationCheckpointing",
    "Compile",
    "ContextParallel",
    "EncoderBalance",
    "ExpertParallel",
    "ParameterStrategy",
    "SetupContext",
    "Single",
    "Stage",
    "Strategy",
    "Ulysses",
]
