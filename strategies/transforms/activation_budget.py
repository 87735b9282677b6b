"""The transform that chooses recomputation, offload and tiles so that activations fit a memory budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge
from pydantic import Field
from torch import nn
from typing_extensions import override

from veomni.config.section import Validated
from veomni.errors import ConfigError
from veomni.logging import create_logger
from veomni.metrics.activation_memory import ActivationMemory, ActivationPolicy
from veomni.strategies.base import SetupContext, Stage, Strategy
from veomni.strategies.expert_parallel import ExpertParallel
from veomni.strategies.transforms.blocks import ActivationCheckpointing
from veomni.strategies.transforms.tiled_mlp import TiledMLP

if TYPE_CHECKING:
    from veomni.models.adapter.adapter import ModelAdapter

logger = create_logger(__name__)

_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20}
Budget = Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?[GM]iB$")]


@dataclass(eq=False)
class ActivationBudget(Validated, Strategy):
    """Keep activations within a memory budget by the fastest policy that fits.

    Policies are tried in this order: nothing recomputed, selective and full activation checkpointing, offload of block
    inputs to host memory, tiled MLPs.

    Raises ConfigError at set-up where no policy fits, or the activations of the model are not counted.

    Args:
        memory: Device memory for activations, such as "40 GiB".
        tokens: Tokens that a forward takes on a rank: of all its rows, or of the rank's shards of them.
    """

    name = "activation_budget"
    stage = Stage.RECOMPUTATION

    memory: Budget
    tokens: Annotated[int, Ge(1)]

    @override
    def chosen(self, adapter: ModelAdapter, context: SetupContext) -> Sequence[Strategy]:
        sizes = self._count(adapter.model, context)
        policy = choose(sizes, self.memory, self.tokens)
        taken = sizes.bytes(self.tokens, policy) / _UNITS["GiB"]
        logger.info_rank0("activations: %s; %.1f GiB of %s for %s tokens", policy, taken, self.memory, self.tokens)
        tiles = [] if policy.tile is None else [TiledMLP(policy.tile)]
        recomputed = [] if policy.recompute == "none" else [ActivationCheckpointing(policy.recompute, policy.offload)]
        return [*tiles, *recomputed]

    @staticmethod
    def _count(model: nn.Module, context: SetupContext) -> ActivationMemory:
        fixed = any(isinstance(each, ExpertParallel) and each.exchange == "fixed" for each in context.strategies)
        itemsize, ranks = context.precision.compute.itemsize, context.state.dims.experts
        return ActivationMemory.of(model, context.plan, itemsize, expert_ranks=ranks, fixed_exchange=fixed)


def choose(sizes: ActivationMemory, memory: str, tokens: int) -> ActivationPolicy:
    """Return the fastest policy whose activations of ``tokens`` fit into ``memory``, such as "40 GiB".

    Raises:
        ConfigError: None fits; it names the memory that is needed, and the tokens that fit.
    """
    budget = float(memory[:-3]) * _UNITS[memory[-3:]]
    for policy in sizes.policies:
        if sizes.bytes(tokens, policy) <= budget:
            return policy
    smallest = min(sizes.policies, key=lambda each: sizes.bytes(tokens, each))  # tiles save nothing of a short row
    needed, fits = math.ceil(sizes.bytes(tokens, smallest) / _UNITS["MiB"]), sizes.longest(budget, smallest)
    shorter = f", or give a rank at most {fits} tokens: shorter rows, or more ranks that share one" if fits else ""
    problem = f"activations of {tokens} tokens a rank take at least {needed} MiB ({smallest}), not {memory}"
    raise ConfigError(problem, f"allow {needed} MiB{shorter}", "ActivationBudget.memory")
