"""Reads the steps of a loader, each agreed on by all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from veomni.batch.counts import label_count, row_count, token_weight
from veomni.batch.fields import component_tokens
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import DataError
from veomni.launch import StopSignal
from veomni.launch.world import World
from veomni.logging import create_logger
from veomni.loop.reporter import Reporter
from veomni.loop.step import Step
from veomni.loop.sync import StepTotals, extremes, sync_step
from veomni.parallel.mesh import ParallelState
from veomni.strategies import Strategy

logger = create_logger(__name__)


class StepReader:
    """Reads one step after another, until the data of a rank ends; collective.

    Args:
        loader: Yields the list of this data rank's micro-batches of a step.
        world: The process among all ranks.
        strategies: Split rows that the loader did not split.
        signal: Whether this process was signalled to stop.
        reporter: Counts FLOPs.

    Attributes:
        stopping: Whether any process was signalled to stop, before the step that was read last.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        world: World,
        strategies: Sequence[Strategy],
        signal: StopSignal,
        reporter: Reporter,
    ) -> None:
        self._loader, self._iterator, self._world, self._strategies = loader, iter(loader), world, strategies
        self._signal, self._reporter = signal, reporter
        self.stopping = False

    def read(self, index: int) -> Step | None:
        """Return the next step of all ranks, to be called ``index``; None where a rank has no more."""
        batch = next(self._iterator, None)
        ready = batch is not None
        micro_batches = [shard(micro, self._strategies, self._world.state) for micro in listed(batch)] if ready else []
        exhausted = ready and getattr(self._loader, "exhausted", False)
        decisions = {
            "ready": ready, "stop": self._signal.requested,
            "exhausted": exhausted and all(micro.is_empty for micro in micro_batches),
        }  # fmt: skip
        copies = self._world.state.size("sequence")
        sums = sync_step({**decisions, **counts_of(micro_batches, self._reporter.measure(micro_batches), copies)})
        with_batch, stop, exhausted_ranks = (sums.pop(name) for name in decisions)
        ranks = self._world.world_size
        if 0 < with_batch < ranks:
            logger.warning_rank0("uneven data: dropped a last batch held by only %d of %s ranks", with_batch, ranks)
        if with_batch < ranks or exhausted_ranks == ranks:
            return None
        self.stopping = stop > 0
        return Step(index, micro_batches, totals_of(sums), self._world)


def shard(micro: MicroBatch, strategies: Sequence[Strategy], state: ParallelState) -> MicroBatch:
    """Return this rank's shard of a micro-batch; one that its loader has split is returned as it is."""
    for strategy in strategies:
        micro = strategy.shard(micro, state)
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


def counts_of(micro_batches: Sequence[MicroBatch], flops: tuple[float, float], copies: int) -> dict[str, float]:
    """Return this rank's counts of a step, by the names of :class:`StepTotals`; those of components are prefixed.

    Args:
        micro_batches: The step's.
        flops: With causal attention, and with full.
        copies: Ranks that share each row, and count its work.
    """
    tokens = sum(sum(micro.rows.document_lengths) for micro in micro_batches)
    counts = {
        "token_weight": _counted(token_weight, micro_batches),
        "labels": _counted(label_count, micro_batches),
        "tokens": tokens / copies, "samples": _counted(row_count, micro_batches) / copies,
        "flops_causal": flops[0] / copies, "flops_full": flops[1] / copies,
    }  # fmt: skip
    components = [component_tokens(micro.inputs) for micro in micro_batches]
    for name in component_tokens({}):
        counts[f"components.{name}"] = sum(each[name] for each in components)
    return counts


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
