"""One optimizer step: its micro-batches, what all ranks agreed on, and what each model made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from veomni.batch.counts import label_count, token_weight
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import DataError, LoopError, ModelError
from veomni.launch.world import World
from veomni.loop.losses import loss_context, shared_loss
from veomni.loop.randomness import same_draws_after
from veomni.loop.sync import sync_step
from veomni.models.adapter.adapter import ModelAdapter
from veomni.moe import ExpertLoad, RouterController
from veomni.ops.host_copy import HostCopy

Weight = Callable[[MicroBatch], float]
"""Returns what the loss of a micro-batch is a mean over: its share of the step's mean is in proportion."""

GradSync = Callable[[nn.Module, bool], AbstractContextManager[None]]


@dataclass(eq=False)
class Step:
    """All micro-batches of one optimizer step on this rank; what ``Launcher.track`` yields.

    Attributes:
        index: The optimizer step, counted from 1 over the whole run.
        micro_batches: This rank's shards, on the CPU.
        totals: What the ranks agreed on: the sums of :func:`~veomni.loop.step_reader.counts_of`.
        stopping: Whether a process was signalled to stop before it.
        profiling: Whether a process was signalled before it to profile the next steps.
        models: What each model that was accumulated on made of it.
    """

    index: int
    micro_batches: Sequence[MicroBatch]
    totals: Mapping[str, float]
    world: World
    stopping: bool = False
    profiling: bool = False
    models: dict[nn.Module, ModelStep] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        fix = "iterate over launcher.accumulate(model, step), or step.micro_batches"
        raise LoopError("a step is not iterated directly", fix)

    def accumulate(self, model: nn.Module, grad_sync: GradSync, weight: Weight | None) -> ModelStep:
        """Return the step of a model, to be iterated; see ``Launcher.accumulate``."""
        if model in self.models:
            name = type(model).__name__
            raise LoopError(f"step {self.index} was accumulated on {name} twice", "accumulate once per step and model")
        self.models[model] = ModelStep(self, model, grad_sync, weight)
        return self.models[model]

    def of(self, model: nn.Module | None = None) -> ModelStep:
        """Return the step of a model, or of the only one; a LoopError where it was not accumulated on."""
        if model is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if model is not None and model in self.models:
            return self.models[model]
        names = ", ".join(type(each).__name__ for each in self.models) or "no model"
        raise LoopError(f"step {self.index} was accumulated on {names}", "name the model that was accumulated on")

    def routing(self) -> dict[str, Tensor]:
        """Return the metrics of all models' routers; where several have some, those of later ones are numbered."""
        found: dict[str, Tensor] = {}
        for number, each in enumerate(self.models.values()):
            for name, value in ({} if each.routers is None else each.routers.metrics()).items():
                found[f"{name}_{number}" if name in found else name] = value
        return found

    def expert_loads(self) -> list[ExpertLoad]:
        """Return the load of the experts of every model whose load is to be reported now."""
        loads = (each.routers.load_due(self.index) for each in self.models.values() if each.routers is not None)
        return [load for load in loads if load is not None]

    def check_complete(self) -> None:
        """Raise a LoopError if a micro-batch of a model was not backpropagated."""
        for each in self.models.values():
            each.check_complete()


class ModelStep:
    """One model's part of a step; see :class:`Step` and ``Launcher.accumulate`` for the arguments.

    Attributes:
        total: What the step's loss is a mean over: the weights of all micro-batches of all ranks.
        loss: This rank's share of the step's mean loss; a 0-d tensor on the device.
        losses: The same by component of a composed model.
        source_sums: Of a mixture, the summed losses of this rank's supervised tokens, each times its weight, and summed
            weights, by source; ``[2, sources]`` on the device; None where the model computes its loss itself.
        source_copy: The same for the host, once every micro-batch had its backward.
        routers: What balances and reports the model's routers.
    """

    def __init__(self, step: Step, model: nn.Module, grad_sync: GradSync, weight: Weight | None) -> None:
        # Not the step itself: a circle would keep the tensors of every step until a collection of garbage.
        self._index, self._world, self._model, self._grad_sync = step.index, step.world, model, grad_sync
        self.micro_batches, self.totals, self._device = step.micro_batches, step.totals, step.world.device
        adapter = ModelAdapter.of(model)
        if adapter.traits is None:
            name = type(model).__name__
            raise LoopError(f"this {name} was not set up", "use the module that launcher.setup_model returned")
        self.routers: RouterController | None = adapter.routers
        self.weights, self.total = self._weights(adapter.loss is not None, weight)
        self.loss = torch.zeros((), device=self._device)
        self.losses: dict[str, Tensor] = {}
        self.source_sums: Tensor | None = None
        self.source_copy: HostCopy | None = None
        self._context: Any = None
        self._backpropagated: set[int] = set()

    def _weights(self, shifts: bool, weight: Weight | None) -> tuple[list[float], float]:
        if weight is None:
            weights = [token_weight(micro) if shifts else label_count(micro) for micro in self.micro_batches]
            total = self.totals["token_weight" if shifts else "labels"]
            if not total and not shifts and self.totals["samples"]:
                problem = f"no label of step {self._index} counts: all are -100"
                raise DataError(problem, "give it labels, or leave it out")
            return weights, total or 1.0
        weights = [float(weight(micro)) for micro in self.micro_batches]
        total = sync_step({"weight": sum(each if each >= 0 else math.nan for each in weights)})["weight"]
        if not total > 0:
            problem = f"the weights of step {self._index} sum to {total}"
            raise LoopError(problem, "let weight= return what a loss averages over, 0 or more")
        return weights, total

    def __iter__(self) -> Iterator[MicroBatch]:
        if self.routers is not None:
            self.routers.begin_step(self.totals["tokens"], len(self.micro_batches))
        if self.routers is not None and self.routers.counts_first:
            with same_draws_after(self._world.accelerator):
                run = lambda held: forward(self._model, self._moved(held))  # noqa: E731
                self.routers.count_first(self.micro_batches, run)
        for index, (held, weight) in enumerate(zip(self.micro_batches, self.weights, strict=True)):
            last = index == len(self.micro_batches) - 1
            micro = replace(self._moved(held), weight=weight, index=index, last=last, owner=self)
            watch = nullcontext() if self.routers is None else self.routers.micro_batch(held)
            with self._grad_sync(self._model, last), watch, loss_context(self._model, micro) as self._context:
                self._forward = record_function("forward")
                self._forward.__enter__()
                yield micro

    def _moved(self, held: MicroBatch) -> MicroBatch:
        """Return a micro-batch on the device; the host does not wait for what the device has to do before."""
        pins = self._world.accelerator.supports_pinned_memory
        return (held.pin_memory() if pins else held).to(self._device)

    def backward(self, loss: Tensor | Mapping[str, Tensor], micro: MicroBatch) -> None:
        """Add a micro-batch's gradients; see ``Launcher.backward``."""
        self._check(loss, micro)
        if self.routers is not None:
            self.routers.before_backward(micro.last)
        share = shared_loss(loss, micro, self)
        self.loss = self.loss + share.detach()
        self._forward.__exit__(None, None, None)
        with record_function("backward"):
            (share * self._world.state.size("loss")).backward()
        if self._context.source_sums is not None:
            sums = self._context.source_sums
            self.source_sums = sums if self.source_sums is None else self.source_sums + sums
        self._backpropagated.add(micro.index)
        if self.source_sums is not None and len(self._backpropagated) == len(self.micro_batches):
            self.source_copy = HostCopy(self.source_sums)
        if self.routers is not None and micro.last:
            self.routers.end_step()

    def _check(self, loss: Any, micro: MicroBatch) -> None:
        if loss is None:
            problem = f"{type(self._model).__name__} returned no loss"
            raise ModelError(problem, "give it labels, or compute the loss from what it returns")
        for each in loss.values() if isinstance(loss, Mapping) else (loss,):
            if not isinstance(each, Tensor) or each.numel() != 1:
                found = f"a tensor of shape {list(each.shape)}" if isinstance(each, Tensor) else type(each).__name__
                raise LoopError(f"backward() was given {found} for a loss", "give it the mean, one value")
        if micro.index in self._backpropagated:
            problem = f"step {self._index}: micro-batch {micro.index} had a second launcher.backward"
            raise LoopError(problem, "add its losses, and call launcher.backward once for their sum")

    def check_complete(self) -> None:
        """See :meth:`Step.check_complete`."""
        count, missing = len(self.micro_batches), len(self.micro_batches) - len(self._backpropagated)
        if missing:
            raise LoopError(
                f"step {self._index}: {missing} of {count} micro-batches had no launcher.backward",
                "call launcher.backward(loss, micro) instead of loss.backward() for every micro-batch that "
                "launcher.accumulate yields, and do not break out of it",
            )


def check_gradients(optimizer: Optimizer, *_: Any) -> None:
    """Raise a LoopError if an optimizer is about to step, and no parameter has a gradient."""
    if all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"]):
        problem = "optimizer.step() was called, and no parameter has a gradient"
        raise LoopError(problem, "accumulate before it: for micro in launcher.accumulate(model, step)")


def forward(model: nn.Module, micro: MicroBatch) -> Any:
    """Return what a model makes of a micro-batch."""
    return model(*micro.args, **micro.inputs)
