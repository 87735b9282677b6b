"""Turn what people give a launcher into strategy objects that compose."""

from collections.abc import Sequence

from veomni.errors import ConfigError, LayoutError
from veomni.parallel.mesh import ParallelDims
from veomni.strategies.base import STRATEGIES, ParameterStrategy, Stage, Strategy


def select_strategies(choice: str | Strategy | Sequence[Strategy]) -> list[Strategy]:
    """Return the strategies of an object, several, a registered name or "auto", in the order of their stages.

    What is no strategy is a ConfigError; one that is given twice, or named but without parameters, a LayoutError.
    """
    if isinstance(choice, Strategy):
        return [choice]
    if isinstance(choice, str):
        found = STRATEGIES.get("fsdp2" if choice == "auto" else choice)
        if not issubclass(found, ParameterStrategy):
            raise LayoutError(f"strategy {choice} does not hold parameters", "give objects: [FSDP2(), Ulysses(2)]")
        return [found()]
    for each in choice if isinstance(choice, Sequence) else [choice]:
        if not isinstance(each, Strategy):
            raise ConfigError(f"{each!r} is given for a strategy", "give objects: [FSDP2(), Ulysses(2)]")
    names = [strategy.name for strategy in choice]
    if twice := [name for name in names if names.count(name) > 1]:
        raise LayoutError(f"strategy {twice[0]} is given twice", "give it once")
    if len(both := [each.name for each in choice if each.stage is Stage.RECOMPUTATION]) > 1:
        raise LayoutError(f"{' and '.join(both)} both choose what is recomputed", "give one of them")
    if {"activation_budget", "tiled_mlp"} <= {*names}:
        problem = "activation_budget chooses what runs in tiles, and tiled_mlp is given beside it"
        raise LayoutError(problem, "give one of them")
    return sorted(choice, key=lambda strategy: strategy.stage)


def parameter_strategy(strategies: Sequence[Strategy]) -> ParameterStrategy:
    """Return the one strategy that holds the parameters; a LayoutError where there is none, or several."""
    owners = [strategy for strategy in strategies if isinstance(strategy, ParameterStrategy)]
    if len(owners) != 1:
        found = ", ".join(owner.name for owner in owners) or "none"
        problem = f"exactly one strategy must hold the parameters; these do: {found}"
        raise LayoutError(problem, "give one of Single, DDP, FSDP1 and FSDP2, and others beside it")
    return owners[0]


def mesh_dims(strategies: Sequence[Strategy], world_size: int) -> ParallelDims:
    """Return the sizes of the mesh axes that strategies declare; a LayoutError where they do not fit ``world_size``."""
    sizes = {"dp_shard": -1 if world_size > 1 else 1}
    for strategy in strategies:
        sizes |= strategy.mesh_axes()
    return ParallelDims(**sizes).resolve(world_size)
