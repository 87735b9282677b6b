"""The contract of a strategy: what it needs of the mesh, and what it does to a model, a batch and the gradients.

Strategies compose. Exactly one of them holds the parameters (:class:`ParameterStrategy`); others split sequences,
experts or tensors beside it. A strategy reads a :class:`~veomni.parallel.plan.ParallelPlan` and never a model's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veomni.accelerators import Accelerator
from veomni.batch.micro_batch import MicroBatch
from veomni.models.traits.verdict import Trait
from veomni.parallel.mesh import ParallelState
from veomni.parallel.plan import ParallelPlan
from veomni.registry import Registry
from veomni.strategies.transforms.precision import Precision

Materialize = Callable[[nn.Module, str], None]
"""Gives the meta parameters and buffers under a module (its name in the model second) their storage and values."""


@dataclass(frozen=True)
class SetupContext:
    """What a strategy may know when it takes a model over."""

    state: ParallelState
    accelerator: Accelerator
    device: torch.device
    precision: Precision
    plan: ParallelPlan
    materialize: Materialize


STRATEGIES: Registry[type[Strategy]] = Registry("strategy", group="veomni.strategies", home="veomni.strategies.select")
"""Strategies by the names that configurations use."""


class Strategy(ABC):
    """One way of spreading work over ranks.

    A third-party strategy subclasses this (or :class:`ParameterStrategy`) and names itself in the entry-point group
    ``veomni.strategies``.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[type[Trait], ...]] = ()
    """Traits that a model must have where the strategy spreads work over more than one rank."""

    def mesh_axes(self) -> Mapping[str, int]:
        """Return the mesh axes this strategy needs and their sizes; -1 is "the rest of the world"."""
        return {}

    def check(self, world_size: int) -> None:
        """Refuse a world this strategy cannot work in, before any process group exists.

        Raises:
            LayoutError: it cannot.
        """
        return

    def shard(self, micro: MicroBatch, state: ParallelState) -> MicroBatch:
        """Return this rank's shard of a micro-batch; strategies that do not split samples return it whole."""
        return micro

    def prepare(self, model: nn.Module, plan: ParallelPlan, state: ParallelState) -> None:
        """Change ``model`` before it is recomputed, compiled and sharded; it may be on the meta device.

        Raises:
            ModelError: the model cannot be spread this way.
        """
        return

    def verify(self, model: nn.Module, body: nn.Module, context: SetupContext) -> None:
        """Check the model that users call (``body`` is the one inside its wrapper), once it has its values.

        Raises:
            ModelError: the model cannot be spread this way.
        """
        return


class ParameterStrategy(Strategy):
    """A strategy that owns parameters and gradients.

    Gradients after the last backward of a step are the average over the ``loss`` view of the mesh.
    """

    @abstractmethod
    def parallelize(self, model: nn.Module, context: SetupContext) -> nn.Module:
        """Return the model to call, its parameters real and placed; ``model`` may still be on the meta device."""

    @abstractmethod
    def grad_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Return the context a micro-batch runs in: gradients are exchanged in it only when it is the ``last``."""

    @abstractmethod
    def grad_norm(self, model: nn.Module) -> Tensor:
        """Return the 2-norm of all gradients as if unsharded: each parameter once, equal on all ranks."""
