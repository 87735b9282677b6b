"""Turn what people give a launcher into strategy objects that compose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veomni.errors import LayoutError
from veomni.parallel.mesh import ParallelDims
from veomni.strategies.base import STRATEGIES, ParameterStrategy, Strategy
from veomni.strategies.ddp import DDP
from veomni.strategies.fsdp1 import FSDP1
from veomni.strategies.fsdp2 import FSDP2
from veomni.strategies.sequence.ulysses import Ulysses
from veomni.strategies.single import Single

for _strategy in (Single, DDP, FSDP1, FSDP2):
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
    # Ulysses last: it exchanges heads around whatever attends, the ring of context parallelism too.
    return sorted(choice, key=lambda strategy: isinstance(strategy, Ulysses))


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
    axes: dict[str, Any] = {}
    for strategy in strategies:
        axes.update(strategy.mesh_axes())
    return ParallelDims(**{"dp_shard": -1 if world_size > 1 else 1, **axes}).resolve(world_size)
