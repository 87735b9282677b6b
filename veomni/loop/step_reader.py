"""Reads the steps of a loader, each agreed on by all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from veomni.batch.counts import label_count, row_count, token_weight
from veomni.batch.fields import component_tokens
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import DataError, NonFiniteError
from veomni.launch.world import World
from veomni.logging import create_logger
from veomni.loop.step import Step
from veomni.loop.sync import StepTotals, extremes, sync_step
from veomni.metrics import StepFlops

logger = create_logger(__name__)


class StepReader:
    """Reads one step after another, until the data of a rank ends.

    Args:
        loader: Yields the list of this data rank's micro-batches of a step.
        world: The ranks; its strategies split rows that the loader did not split.
        measure: Counts the FLOPs of micro-batches.
    """

    def __init__(
        self, loader: Iterable[Any], world: World, measure: Callable[[Sequence[MicroBatch]], StepFlops]
    ) -> None:
        self._loader, self._iterator, self._world, self._measure = loader, iter(loader), world, measure
        self._nonfinite = torch.zeros((), device=world.device)
        # The host reads this copy without waiting for the device: it may be late by steps, and never wrong.
        self._nonfinite_host = torch.zeros((), pin_memory=world.accelerator.supports_pinned_memory)

    def read(self, index: int) -> Step | None:
        """Return the next step of all ranks, to be called ``index``; None where a rank has no more; collective.

        Raises:
            NonFiniteError: the loss of an earlier step was not finite on some rank; raised on all ranks.
        """
        batch = next(self._iterator, None)
        ready = batch is not None
        micro_batches = [shard(micro, self._world) for micro in listed(batch)] if ready else []
        exhausted = ready and getattr(self._loader, "exhausted", False)
        decisions = {
            "ready": ready, "stop": self._world.signal.requested, "nonfinite": bool(self._nonfinite_host),
            "exhausted": exhausted and all(micro.is_empty for micro in micro_batches),
        }  # fmt: skip
        copies = self._world.state.size("sequence")
        sums = sync_step({**decisions, **counts_of(micro_batches, self._measure(micro_batches), copies)})
        with_batch, stopping, nonfinite, exhausted_ranks = (sums.pop(name) for name in decisions)
        self._check_finite(nonfinite)
        ranks = self._world.world_size
        if 0 < with_batch < ranks:
            logger.warning_rank0("uneven data: dropped a last batch held by only %d of %s ranks", with_batch, ranks)
        if with_batch < ranks or exhausted_ranks == ranks:
            return None
        return Step(index, micro_batches, totals_of(sums), self._world, stopping=stopping > 0)

    def finish(self, step: Step) -> None:
        """Check that every micro-batch of a step was backpropagated, and take note of losses that are not finite.

        Raises:
            LoopError: one was not.
        """
        step.check_complete()
        for each in step.models.values():
            self._nonfinite += (~each.loss.isfinite()).to(self._nonfinite.dtype)
        self._nonfinite_host.copy_(self._nonfinite, non_blocking=True)

    def close(self) -> None:
        """Check the losses of the steps that were read last; collective.

        Raises:
            NonFiniteError: one was not finite on some rank; raised on all ranks.
        """
        self._check_finite(sync_step({"nonfinite": bool(self._nonfinite)})["nonfinite"])

    def _check_finite(self, ranks: float) -> None:
        if ranks:
            raise NonFiniteError(
                f"the loss of a step was not finite on {ranks:g} of {self._world.world_size} ranks; look at its batch, "
                "the learning rate and the precision, and call launcher.clip_grad_norm, which stops before the step"
            )


def shard(micro: MicroBatch, world: World) -> MicroBatch:
    """Return this rank's shard of a micro-batch; one that its loader has split is returned unchanged."""
    for strategy in world.strategies:
        micro = strategy.shard(micro, world.state)
    return micro


def listed(batch: Any) -> list[MicroBatch]:
    """Return what a loader yields for one step as micro-batches.

    Raises:
        DataError: it is not a list of them.
    """
    if not isinstance(batch, (list, tuple)) or any(isinstance(each, (Tensor, str)) for each in batch):
        found = f"a {type(batch).__name__}"
        if isinstance(batch, (list, tuple)) and batch:
            found += f" of {type(batch[0]).__name__}"
        raise DataError(
            f"a loader must yield the list of a step's micro-batches, and yielded {found}",
            "give a torch DataLoader to launcher.setup_dataloader first, or yield [batch]",
        )
    return [MicroBatch.of(each) for each in batch]


def counts_of(micro_batches: Sequence[MicroBatch], flops: StepFlops, copies: int) -> dict[str, float]:
    """Return this rank's counts of a step, by the names of :class:`StepTotals`; those of components are prefixed.

    Args:
        micro_batches: The step's.
        flops: Their FLOPs.
        copies: Ranks that share each row, and count its work.
    """
    tokens = sum(sum(micro.rows.document_lengths) for micro in micro_batches)
    components = [component_tokens(micro.inputs) for micro in micro_batches]
    return {
        "token_weight": _counted(token_weight, micro_batches),
        "labels": _counted(label_count, micro_batches),
        "tokens": tokens / copies, "samples": _counted(row_count, micro_batches) / copies,
        "flops_causal": flops.causal / copies, "flops_full": flops.full / copies,
        **{f"components.{name}": sum(each[name] for each in components) for name in component_tokens({})},
    }  # fmt: skip


def _counted(count: Callable[[MicroBatch], float], micro_batches: Sequence[MicroBatch]) -> float:
    """Return a sum over micro-batches; NaN where it cannot be counted, an error only where it is needed."""
    try:
        return float(sum(count(micro) for micro in micro_batches))
    except DataError:
        return math.nan


def totals_of(sums: Mapping[str, float]) -> StepTotals:
    """Return the sums of :func:`counts_of` over all ranks as totals."""
    plain = {name: value for name, value in sums.items() if not name.startswith("components.")}
    components = {name.partition(".")[2]: int(value) for name, value in sums.items() if name not in plain}
    return StepTotals(**plain, components=components)


def last_step(loader: Any, done: int) -> int | None:
    """Return the step that the loaders of all ranks reach, where ``done`` are done; None if not known; collective."""
    remaining = getattr(loader, "remaining_steps", None)
    if remaining is None:
        remaining = len(loader) if hasattr(loader, "__len__") else math.inf
    fewest, most = extremes(remaining)  # ranks that ended apart would wait for each other
    if fewest < most:
        logger.warning_rank0("uneven data: ranks have from %g to %g steps, and all end after %g", fewest, most, fewest)
    return None if fewest == math.inf else done + int(fewest)
