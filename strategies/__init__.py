"""Strategies: where parameters, gradients and samples live. Objects that people pass to a launcher."""

from veomni.strategies.base import STRATEGIES, ParameterStrategy, SetupContext, Stage, Strategy
from veomni.strategies.expert_parallel import ExpertParallel
from veomni.strategies.fsdp1 import FSDP1
from veomni.strategies.fsdp2 import FSDP2
from veomni.strategies.replicated import DDP, Single
from veomni.strategies.sequence import ContextParallel, Ulysses
from veomni.strategies.transforms.activation_budget import ActivationBudget
from veomni.strategies.transforms.blocks import ActivationCheckpointing, Compile
from veomni.strategies.transforms.encoder_balance import EncoderBalance
from veomni.strategies.transforms.float8 import Float8
from veomni.strategies.transforms.tiled_mlp import TiledMLP

_BUILT_IN: tuple[type[Strategy], ...] = (
    Single, DDP, FSDP1, FSDP2, ExpertParallel, Ulysses, ContextParallel,
    ActivationBudget, ActivationCheckpointing, TiledMLP, Compile, EncoderBalance, Float8,
)  # fmt: skip
for _strategy in _BUILT_IN:
    STRATEGIES.register(_strategy.name)(_strategy)

__all__ = [
    "DDP", "FSDP1", "FSDP2", "ActivationBudget", "ActivationCheckpointing", "Compile", "ContextParallel",
    "EncoderBalance", "ExpertParallel", "Float8", "ParameterStrategy", "SetupContext", "Single", "Stage", "Strategy",
    "TiledMLP", "Ulysses",
]  # fmt: skip
