"""Turn what people give a launcher into strategy objects that compose."""

from __future__ import annotations

from collections.abc import Sequence

from veomni.errors import LayoutError
from veomni.parallel.mesh import ParallelDims
from veomni.strategies.base import STRATEGIES, ParameterStrategy, Strategy
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

_BUILT_IN: tuple[type[Strategy], ...] = (
    Single, DDP, FSDP1, FSDP2, ExpertParallel, Ulysses, ContextParallel,
    ActivationCheckpointing, Compile, EncoderBalance,
)  # fmt: skip
for _strategy in _BUILT_IN:
    STRATEGIES.register(_strategy.name)(_strategy)


def select_strategies(choice: str | Strategy | Sequence[Strategy]) -> list[Strategy]:
    """Return strategy objects.

    Args:
        choice: An object, several, a registered name ("fsdp2", or an entry point's), or "auto".

    Raises:
        ConfigError: no strategy has that name.
    """
    if isinstance(choice, Strategy):
        return [choice]
    if isinstance(choice, str):
        return [STRATEGIES.get("fsdp2" if choice == "auto" else choice)()]
    return sorted(choice, key=lambda strategy: strategy.stage)


def parameter_strategy(strategies: Sequence[Strategy]) -> ParameterStrategy:
    """Return the one strategy that holds the parameters.

    Raises:
        LayoutError: there is none, or there are several.
    """
    owners = [strategy for strategy in strategies if isinstance(strategy, ParameterStrategy)]
    if len(owners) != 1:
        found = ", ".join(owner.name for owner in owners) or "none"
        raise LayoutError(
            f"exactly one strategy must hold the parameters; these do: {found}",
            "give one of Single, DDP, FSDP1 and FSDP2, and others beside it",
        )
    return owners[0]


def mesh_dims(strategies: Sequence[Strategy], world_size: int) -> ParallelDims:
    """Return the sizes of the mesh axes that strategies ask for, in a world of ``world_size`` ranks.

    Raises:
        LayoutError: they do not fit.
    """
    return ParallelDims.compose((strategy.mesh_axes() for strategy in strategies), world_size)
