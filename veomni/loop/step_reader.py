"""Reads the steps of a loader, each agreed on by all ranks."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from veomni.batch.counts import label_count, row_count, token_weight
from veomni.batch.fields import component_tokens
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import DataError, InputError, LoopError, NonFiniteError
from veomni.launch.world import World
from veomni.logging import create_logger
from veomni.loop.step import Step
from veomni.loop.sync import extremes, sync_step
from veomni.metrics import StepFlops

logger = create_logger(__name__)


class StepReader:
    """Reads one step after another, until the data of a rank ends.

    One reduction per step ends uneven data together, gives the sums that gradients are normalised by, and turns a
    signal to any one process, or a loss that is not finite, into a decision of all. A plain torch ``DataLoader`` is an
    InputError: it yields the same single batches on every rank.
    """

    def __init__(
        self, loader: Iterable[Any], world: World, measure: Callable[[Sequence[MicroBatch]], StepFlops] | None = None
    ) -> None:
        if isinstance(loader, DataLoader):
            problem = "steps are read from a torch DataLoader, which yields single batches"
            raise InputError(problem, "launcher.setup_dataloader(loader), with accumulate= micro-batches per step")
        self._loader, self._iterator, self._world = loader, iter(loader), world
        self._measure = measure or (lambda micro_batches: StepFlops(0.0, 0.0))
        self._nonfinite = torch.zeros((), device=world.device)
        # The host reads this copy without waiting for the device: it may be late by steps, and never wrong.
        self._nonfinite_host = torch.zeros((), pin_memory=world.accelerator.supports_pinned_memory)

    def read(self, index: int) -> Step | None:
        """Return the step ``index``, or None where a rank has no more; NonFiniteError after such a loss; collective."""
        batch, world = next(self._iterator, None), self._world
        ready = batch is not None
        micro_batches = [shard(micro, world) for micro in listed(batch)] if ready else []
        exhausted = ready and getattr(self._loader, "exhausted", False)
        decisions = {
            "ready": ready, "stop": world.signal.requested, "nonfinite": bool(self._nonfinite_host),
            "profile": world.profile_signal.requested,
            "exhausted": exhausted and all(micro.is_empty for micro in micro_batches),
        }  # fmt: skip
        length = {"length": len(micro_batches), "squared_length": len(micro_batches) ** 2}
        counts = counts_of(micro_batches, self._measure(micro_batches), world.state.size("sequence"))
        sums = sync_step({**decisions, **length, **counts})
        _check_finite(sums["nonfinite"])
        with_batch, ranks = sums["ready"], world.world_size
        if 0 < with_batch < ranks:
            logger.warning_rank0("uneven data: dropped a last batch held by only %d of %s ranks", with_batch, ranks)
        if with_batch < ranks or sums["exhausted"] == ranks:
            return None
        if sums["squared_length"] * ranks != sums["length"] ** 2:  # ranks would wait for each other in a forward
            problem = f"rank {world.rank} has {len(micro_batches)} micro-batches in step {index}, and others have not"
            raise LoopError(problem, "give every rank as many, as setup_dataloader and build_dataloader do")
        return Step(index, micro_batches, sums, world, stopping=sums["stop"] > 0, profiling=sums["profile"] > 0)

    def finish(self, step: Step) -> None:
        """Check that every micro-batch of a step was backpropagated, and take note of losses that are not finite."""
        step.check_complete()
        for each in step.models.values():
            self._nonfinite += (~each.loss.isfinite()).to(self._nonfinite.dtype)
        self._nonfinite_host.copy_(self._nonfinite, non_blocking=True)

    def close(self) -> None:
        """Check the losses of the steps that were read last; collective."""
        _check_finite(extremes(bool(self._nonfinite))[1])


def _check_finite(nonfinite: float) -> None:
    if nonfinite:
        raise NonFiniteError(
            "the loss of a step was not finite on some rank; look at its batch, the learning rate and the precision, "
            "and call launcher.clip_grad_norm, which stops before the step"
        )


def shard(micro: MicroBatch, world: World) -> MicroBatch:
    """Return this rank's shard of a micro-batch; one that its loader has split is returned unchanged."""
    for strategy in world.strategies:
        micro = strategy.shard(micro, world.state)
    return micro


def listed(batch: Any) -> list[MicroBatch]:
    """Return what a loader yields for one step as micro-batches; a DataError where it is no list of them."""
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
    """Return this rank's counts of a step; their sums over all ranks are what the losses of models are means over.

    Returns:
        ``token_weight``: weighted number of supervised tokens, of a loss that shifts its labels; ``labels``: those that
        are not ``IGNORE_INDEX``, of a loss that does not, or rows, where there are no labels; ``tokens`` without
        padding; ``samples``, rows; ``flops_causal`` and ``flops_full``, 0 when not known; ``components.NAME``, tokens
        that the loss of each decoder of a composed model is the mean of. Those that cannot be counted are NaN.
    """
    tokens = sum(sum(micro.rows.document_lengths) for micro in micro_batches)
    components = [component_tokens(micro.inputs) for micro in micro_batches]
    return {
        "token_weight": _counted(token_weight, micro_batches),
        "labels": _counted(label_count, micro_batches),
        "tokens": tokens / copies,  # ranks that share a row all count its work
        "samples": _counted(row_count, micro_batches) / copies,
        "flops_causal": flops.causal / copies,
        "flops_full": flops.full / copies,
        **{f"components.{name}": sum(each[name] for each in components) for name in component_tokens({})},
    }


def _counted(count: Callable[[MicroBatch], float], micro_batches: Sequence[MicroBatch]) -> float:
    try:
        return float(sum(count(micro) for micro in micro_batches))
    except DataError:  # it is one only where the number is needed
        return math.nan


def last_step(loader: Any, done: int) -> int | None:
    """Return the step that the loaders of all ranks reach, where ``done`` are done; None if not known; collective."""
    remaining = getattr(loader, "remaining_steps", None)
    if remaining is None:
        remaining = len(loader) if hasattr(loader, "__len__") else math.inf
    fewest, most = extremes(remaining)  # ranks that ended apart would wait for each other
    if fewest < most:
        logger.warning_rank0("uneven data: ranks have from %g to %g steps, and all end after %g", fewest, most, fewest)
    return None if fewest == math.inf else done + int(fewest)
