"""Declared places where a test replaces what the library does: for seeded bugs, faults and fakes."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from veomni.batch.counts import token_weight
from veomni.batch.documents import token_mask
from veomni.batch.fields import shift_left
from veomni.launcher import Launcher
from veomni.loop.losses import shared_loss
from veomni.loop.sync import sync_step
from veomni.models.adapter.passes.documents import documents_of
from veomni.models.weights.initialize import Initializer
from veomni.moe.controller import RouterController
from veomni.moe.load import LoadCounter
from veomni.ops.experts.forward import run_local_experts
from veomni.ops.experts.permute import sum_tokens
from veomni.parallel.mesh import ParallelState
from veomni.strategies import DDP, FSDP1
from veomni.strategies.expert_parallel import average_over
from veomni.strategies.grad_norm import sharded_grad_norm, sharding_of


class Seam(NamedTuple):
    """A public function, method or property that every step passes; a test names it instead of a module."""

    target: Any

    @property
    def function(self) -> Callable[..., Any]:
        """What runs there."""
        return getattr(self.target, "fget", self.target)

    def holders(self, value: Any) -> list[tuple[Any, str]]:
        """Return every module of the library, or class, that holds ``value`` where this seam is, and its name there."""
        *classes, name = self.function.__qualname__.split(".")
        if classes:
            owner = functools.reduce(getattr, classes, sys.modules[self.function.__module__])
            return [(owner, name)] if vars(owner)[name] is value else []
        modules = [module for key, module in sys.modules.items() if key.partition(".")[0] == "veomni"]
        return [(module, key) for module in modules for key, held in list(vars(module).items()) if held is value]


@contextmanager
def replaced(seam: Seam, around: Callable[..., Any]) -> Iterator[None]:
    """Inside the context, run ``around(original, *args, **kwargs)`` wherever the library passes ``seam``."""

    @functools.wraps(seam.function)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return around(seam.function, *args, **kwargs)

    other = property(replacement) if isinstance(seam.target, property) else replacement
    places = seam.holders(seam.target)
    assert places, f"{seam.function.__qualname__} is not found where it is declared: is it replaced already?"
    for owner, name in places:
        setattr(owner, name, other)
    try:
        yield
    finally:
        for owner, name in seam.holders(other):
            setattr(owner, name, seam.target)


# A step
STEP_SYNC = Seam(sync_step)
MICRO_BATCHES = Seam(Launcher.accumulate)
LOSS_WEIGHT = Seam(token_weight)
LOSS_SHARE = Seam(shared_loss)
STEP_LOSS = Seam(Launcher.global_loss)

# Rows
DATA_PARALLEL = Seam(Launcher.data_parallel)
LABEL_SHIFT = Seam(shift_left)
DOCUMENTS = Seam(documents_of)
TOKEN_MASK = Seam(token_mask)

# Parameters and gradients
INITIAL_VALUES = Seam(Initializer.__init__)
GROUP_SIZE = Seam(ParallelState.size)
GRADIENT_SYNC = Seam(DDP.grad_sync)
GRADIENT_NORM = Seam(sharded_grad_norm)
GRADIENT_NORM_OF_FSDP1 = Seam(FSDP1.grad_norm)
GRADIENT_SHARDING = Seam(sharding_of)
EXPERT_AVERAGE = Seam(average_over)

# Experts and their routers
EXPERTS = Seam(run_local_experts)
EXPERT_COMBINE = Seam(sum_tokens)
EXPERT_LOAD = Seam(LoadCounter.reduce)
ROUTER_GRADIENT = Seam(RouterController.gradient)
ROUTER_DECISIONS = Seam(RouterController.observe)
ROUTERS_COUNT_FIRST = Seam(RouterController.counts_first)
