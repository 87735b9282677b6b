"""Turn what people give a launcher into strategy objects that compose."""

from __future__ import annotations

from collections.abc import Sequence

from veomni.errors import LayoutError
from veomni.plugins import load_plugin
from veomni.strategies.base import ParameterStrategy, Strategy
from veomni.strategies.ddp import DDP
from veomni.strategies.fsdp1 import FSDP1
from veomni.strategies.fsdp2 import FSDP2
from veomni.strategies.sequence.ulysses import Ulysses
from veomni.strategies.single import Single

_BUILT_IN = {strategy.name: strategy for strategy in (Single, DDP, FSDP1, FSDP2)}


def select_strategies(choice: str | Strategy | Sequence[Strategy]) -> list[Strategy]:
    """Return strategy objects.

    Args:
        choice: An object, several, the name of an entry point in ``veomni.strategies``, or "auto".

    Raises:
        ConfigError: no strategy has that name.
    """
    if isinstance(choice, Strategy):
        return [choice]
    if isinstance(choice, str):
        return [FSDP2() if choice == "auto" else load_plugin("veomni.strategies", choice, _BUILT_IN)()]
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
