"""The transform that recomputes, offloads and tiles as little as keeps activations within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge
from pydantic import Field
from typing_extensions import override

from veomni.config.section import Validated
from veomni.errors import ConfigError
from veomni.logging import create_logger
from veomni.metrics.activation_memory import ActivationMemory, Rung
from veomni.strategies.base import SetupContext, Stage, Strategy
from veomni.strategies.transforms.blocks import ActivationCheckpointing
from veomni.strategies.transforms.tiled_mlp import TiledMLP

if TYPE_CHECKING:
    from veomni.models.adapter.adapter import ModelAdapter

logger = create_logger(__name__)

_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20}
Budget = Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?[GM]iB$")]


@dataclass(eq=False)
class ActivationBudget(Validated, Strategy):
    """Keep activations within a budget by the cheapest of: nothing, selective and full recomputation, offload, tiles.

    Raises ConfigError at set-up where the leanest needs more, or the activations of a model are not counted.

    Args:
        memory: What activations may take of a device, such as "40 GiB".
        tokens: Tokens that a forward takes on a rank: of all its rows, or of the rank's shards of them.
    """

    name = "activation_budget"
    stage = Stage.RECOMPUTATION

    memory: Budget
    tokens: Annotated[int, Ge(1)]

    @override
    def chosen(self, adapter: ModelAdapter, context: SetupContext) -> Sequence[Strategy]:
        sizes = ActivationMemory.of(adapter.model, context.plan, context.precision.compute.itemsize)
        rung = choose(sizes, self.memory, self.tokens)
        taken = sizes.bytes(self.tokens, rung) / _UNITS["GiB"]
        logger.info_rank0("activations: %s; %.1f GiB of %s for %s tokens", rung, taken, self.memory, self.tokens)
        tiles = [] if rung.tile is None else [TiledMLP(rung.tile)]
        return [*tiles, *([] if rung.recompute == "none" else [ActivationCheckpointing(rung.recompute, rung.offload)])]


def choose(sizes: ActivationMemory, memory: str, tokens: int) -> Rung:
    """Return the cheapest way to keep activations that takes at most ``memory``; a ConfigError where none does."""
    budget = float(memory[:-3]) * _UNITS[memory[-3:]]
    for rung in sizes.ladder:
        if sizes.bytes(tokens, rung) <= budget:
            return rung
    leanest = min(sizes.ladder, key=lambda rung: sizes.bytes(tokens, rung))  # tiles save nothing of a short row
    needed, fits = math.ceil(sizes.bytes(tokens, leanest) / _UNITS["MiB"]), sizes.longest(budget, leanest)
    shorter = f", or give a rank at most {fits} tokens: shorter rows, or more ranks that share one" if fits else ""
    problem = f"activations of {tokens} tokens a rank take at least {needed} MiB ({leanest}), not {memory}"
    raise ConfigError(problem, f"allow {needed} MiB{shorter}", "ActivationBudget.memory")
