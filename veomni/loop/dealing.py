"""How the samples of a torch ``DataLoader`` are dealt to data ranks, in one order that all of them draw."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from veomni.errors import CheckpointError


@dataclass(frozen=True)
class Deal:
    """Which of a step's units (samples, or ready batches) a data rank gets; ``drop_last``: of steps that are full."""

    rank: int
    size: int
    batch_size: int
    accumulate: int
    drop_last: bool

    @property
    def units(self) -> int:
        """Units of a step over all ranks."""
        return self.size * self.batch_size * self.accumulate

    def steps(self, total: int) -> int:
        """Return the number of steps that ``total`` units make."""
        return total // self.units if self.drop_last else -(-total // self.units)

    def micro_batches(self, units: Sequence[Any], start: int) -> list[Sequence[Any]]:
        """Return this rank's micro-batches of the step at ``start``: equally many on all ranks, some of them empty."""
        step = units[start : start + self.units]
        mine = step[self.rank :: self.size]
        count = -(-len(step) // (self.size * self.batch_size))
        return [mine[at * self.batch_size : (at + 1) * self.batch_size] for at in range(count)]


def drawn(sampler: Iterable[Any], dataset: Any, seed: int, epoch: int) -> Sequence[Any]:
    """Return all that a sampler yields, of a ``DistributedSampler`` over the whole dataset, by (seed, epoch) alone."""
    if isinstance(sampler, DistributedSampler):
        sampler = RandomSampler(dataset) if sampler.shuffle else SequentialSampler(dataset)
    if isinstance(sampler, SequentialSampler):
        return range(len(dataset))
    key, state = (seed * 1_000_003 + epoch) % (1 << 63), random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key)
            random.seed(key)
            parts: list[Any] = [sampler, getattr(sampler, "sampler", None)]
            for part in parts:
                if isinstance(getattr(part, "generator", None), torch.Generator):
                    part.generator.manual_seed(key)
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
            return list(sampler)
    finally:
        random.setstate(state)


_OPTIONS = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "prefetch_factor",
    "multiprocessing_context", "generator", "persistent_workers",
)  # fmt: skip


def options_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return the options of a loader that do not choose its samples."""
    return {name: getattr(loader, name) for name in _OPTIONS}


def is_ready(loader: DataLoader[Any]) -> bool:
    """Whether a batch sampler of the user's own makes the batches, which are then dealt whole."""
    return loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler


def check_same_data(state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a CheckpointError that names what differs, where a state is that of other data or another order of them."""
    saved = dict(state.get("data", {}))
    changed = [f"{name} ({saved.get(name)!r} then, {now[name]!r} now)" for name in now if saved.get(name) != now[name]]
    if changed:
        problem = f"the data differ from the checkpoint's: {', '.join(changed)}"
        raise CheckpointError(problem, "restore them, or start a new run")
