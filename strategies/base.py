"""The contract of a strategy; of a model it reads a :class:`ParallelPlan`, and never the name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import IntEnum, auto
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from veomni.accelerators import Accelerator
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import LoopError
from veomni.models.traits.trial import Trait
from veomni.parallel.mesh import ParallelDims, ParallelState
from veomni.parallel.plan import ParallelPlan
from veomni.registry import Registry
from veomni.strategies.grad_norm import sharded_grad_norm

SetUp = TypeVar("SetUp")

if TYPE_CHECKING:
    from veomni.models.adapter.adapter import ModelAdapter
    from veomni.strategies.transforms.precision import Precision


class Stage(IntEnum):
    """The order in which strategies transform a model."""

    FINE_TUNING = auto()
    FLOAT8 = auto()  # before stages that wrap linear layers in exchanges
    TENSORS = auto()
    TILES = auto()
    EXPERTS = auto()  # after tiles: runs the forward of shared experts while tokens are in flight
    RING = auto()
    ULYSSES = auto()  # exchanges heads around any attention, the ring too
    ENCODERS = auto()
    COMPILATION = auto()  # compiles at the first call, after all patches of forwards
    RECOMPUTATION = auto()  # wraps compiled blocks to offload their inputs
    PRECISION = auto()
    PARAMETERS = auto()


@dataclass(frozen=True)
class SetupContext:
    """What a strategy may read when it transforms a model.

    Attributes:
        plan: Blocks, experts and float32 modules of the model, by name.
        parameters: The strategy that holds the parameters.
        strategies: All that are composed, as they were given.
        materialize: Gives meta parameters and buffers under a module (its name in the model second) their values.
        placed: Modules, by name, whose parameters another strategy has placed and whose gradients it reduces. A
            parameter strategy materialises them, and leaves them alone otherwise.
    """

    state: ParallelState
    accelerator: Accelerator
    device: torch.device
    precision: Precision
    plan: ParallelPlan
    parameters: ParameterStrategy
    materialize: Callable[[nn.Module, str], None]
    strategies: Sequence[Strategy]
    placed: dict[str, nn.Module] = field(default_factory=dict)

    def placed_parameters(self) -> set[nn.Parameter]:
        """Return the parameters of all modules in :attr:`placed`."""
        return {parameter for module in self.placed.values() for parameter in module.parameters()}


def set_up_as(kind: type[SetUp], model: nn.Module) -> SetUp:
    """Return ``model``, which a strategy's ``parallelize`` made an instance of ``kind``.

    Raises:
        LoopError: it did not.
    """
    if not isinstance(model, kind):
        name = type(model).__name__
        raise LoopError(f"this {name} was not set up", "use the module that launcher.setup_model returned")
    return model


STRATEGIES: Registry[type[Strategy]] = Registry("strategy", group="veomni.strategies", home="veomni.strategies")
"""Strategies by the names that configurations use."""


class Strategy(ABC):
    """One way of spreading work over ranks, or one transform of the model that ranks work on.

    A third-party strategy subclasses this (or :class:`ParameterStrategy`) and names itself in the entry-point group
    ``veomni.strategies``. ``requires`` are traits (``veomni.models.traits``) that the model must have.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage] = Stage.TENSORS
    requires: ClassVar[tuple[type[Trait], ...]] = ()

    def mesh_axes(self) -> Mapping[str, int]:
        """Return the sizes of the mesh axes that it needs; -1 is "the rest of the world"."""
        return {}

    def check(self, world_size: int) -> None:
        """Check, before any process group exists, that this works in a world of this size; else LayoutError."""
        return

    def check_model(self, facts: Mapping[str, Any], row_length: int, dims: ParallelDims) -> None:
        """Check a model's text configuration, and the tokens of a row, before any process starts; else InputError."""
        return

    def chosen(self, adapter: ModelAdapter, context: SetupContext) -> Sequence[Strategy]:
        """Return what transforms this model, which nothing has transformed yet: itself, or what it chooses instead."""
        return [self]

    def transform(self, adapter: ModelAdapter, context: SetupContext) -> None:
        """Change the model, which may be on the meta device; a ModelError where it does not support this strategy."""
        return

    def shard(self, micro: MicroBatch, state: ParallelState) -> MicroBatch:
        """Return this rank's shard of a micro-batch; strategies that do not split samples return it whole."""
        return micro

    def grad_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Return the context a micro-batch runs in: gradients are exchanged in it only when it is the ``last``."""
        return nullcontext()


class ParameterStrategy(Strategy):
    """A strategy that owns parameters and gradients.

    Gradients after the last backward of a step are the average over the ``loss`` view of the mesh.

    Attributes:
        casts_parameters: Whether mixed precision casts parameters; otherwise forwards run under autocast.
        cpu_offload: Whether parameters, gradients and optimizer state live in host memory.
        reshard_after_forward: Whether gathered parameters are freed between forward and backward.
    """

    stage = Stage.PARAMETERS
    casts_parameters: ClassVar[bool] = False
    cpu_offload: bool = False
    reshard_after_forward: bool = False

    def storage_device(self, device: torch.device) -> torch.device:
        """Return where parameters of a run on ``device`` live."""
        return torch.device("cpu") if self.cpu_offload else device

    @abstractmethod
    def parallelize(self, model: nn.Module, context: SetupContext) -> nn.Module:
        """Return the model to call, its parameters real and placed; ``model`` may still be on the meta device."""

    @abstractmethod
    @override
    def grad_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[None]: ...

    def grad_norm(self, model: nn.Module) -> Tensor:
        """Return the 2-norm of all gradients as if unsharded: each parameter once, equal on all ranks."""
        return sharded_grad_norm(model.parameters(), next(model.parameters()).device)


@contextmanager
def sync_gradients(strategies: Sequence[Strategy], model: nn.Module, last: bool) -> Iterator[None]:
    """Run a micro-batch of ``model``: every strategy exchanges its gradients only in the ``last`` one."""
    with ExitStack() as stack:
        for strategy in strategies:
            stack.enter_context(strategy.grad_sync(model, last))
        yield
