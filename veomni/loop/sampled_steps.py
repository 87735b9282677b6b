"""Steps of a torch ``DataLoader`` over a map-style dataset: samples, or ready batches, in an order all ranks share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from veomni.batch.micro_batch import MicroBatch
from veomni.errors import DataError
from veomni.loop.dealing import Deal, check_same_data, drawn, is_ready, options_of


class SampledSteps:
    """Yields, per optimizer step, this data rank's list of micro-batches.

    The (batch) sampler, which is finite and draws from torch's generator, Python's, or one of its own, is drawn from
    (seed, epoch), the same on all ranks; a step takes the next ``batch_size * accumulate * size`` samples, and rank r
    every ``size``-th of them. So every sample comes once per epoch, and steps of equal size hold the same samples on
    any number of ranks. The last step of an epoch is shorter unless ``drop_last``; a rank without a sample in it gets a
    filler of weight 0. ``epoch`` counts the epochs completed; ``epochs`` are those of one iteration.
    """

    exhausted = False

    def __init__(self, loader: DataLoader[Any], deal: Deal, *, seed: int, epochs: int) -> None:
        self._given, self._deal, self._seed, self._epochs = loader, deal, seed, epochs
        self._ready = is_ready(loader)
        self._single = loader.batch_size is None and not self._ready
        self._order: tuple[int, Sequence[Any]] | None = None
        self.epoch = self._done = 0
        plan = _Plan(self._indices)
        chosen: dict[str, Any] = {"sampler": plan, "batch_size": None} if self._single else {"batch_sampler": plan}
        self._loader: DataLoader[Any] = DataLoader(loader.dataset, **options_of(loader), **chosen)
        if not self.steps_per_epoch:
            problem = f"the loader has {len(self._units)} samples or batches, and a step takes {deal.units}"
            raise DataError(problem, "give more data, a smaller batch_size or accumulate, or drop_last=False")

    @property
    def _units(self) -> Sequence[Any]:
        """The current epoch's samples by index, or its ready batches, of all ranks in order."""
        if self._order is None or self._order[0] != self.epoch:
            sampler: Any = self._given.batch_sampler if self._ready else self._given.sampler
            self._order = self.epoch, drawn(sampler, self._given.dataset, self._seed, self.epoch)
        return self._order[1]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self._deal.steps(len(self._units))

    @property
    def remaining_steps(self) -> int:
        """Optimizer steps until the iteration ends."""
        ahead = self._epochs - self.epoch % self._epochs
        return ahead * self.steps_per_epoch - self._done // self._deal.units

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        last = self.epoch - self.epoch % self._epochs + self._epochs
        while self.epoch < last:
            end = self.steps_per_epoch * self._deal.units
            if self._done >= end:  # saved by a run whose steps were larger: nothing is left of the epoch
                self.set_epoch(self.epoch + 1)
            else:
                yield from self._rest_of_epoch(end)

    def _rest_of_epoch(self, end: int) -> Iterator[list[MicroBatch]]:
        batches, units = iter(self._loader), self._units
        for start in range(self._done, end, self._deal.units):
            counts = [self._samples(micro) for micro in self._deal.micro_batches(units, start)]
            step = [MicroBatch.of(next(batches), samples=count) for count in counts]
            self._done = start + self._deal.units  # before the yield: a state taken in the loop contains this step
            if self._done >= end:
                self.set_epoch(self.epoch + 1)
            yield step

    def _samples(self, micro: Sequence[Any]) -> int | None:
        """Return the samples of a micro-batch; None where the dataset itself yields batches, of unknown size."""
        if self._single:
            return None if micro else 0
        return sum(len(batch) for batch in micro) if self._ready else len(micro)

    def _indices(self) -> Iterator[Any]:
        """Yield the indices of each of this rank's micro-batches from the current position to the end of the epoch."""
        units = self._units
        for start in range(self._done, self.steps_per_epoch * self._deal.units, self._deal.units):
            for micro in self._deal.micro_batches(units, start):
                chosen = list(micro or units[start : start + 1])  # a filler is a copy of the step's first sample
                yield chosen[0] if self._ready or self._single else chosen

    def set_epoch(self, epoch: int) -> None:
        """Continue with ``epoch``, from its beginning unless it is the current one."""
        if epoch != self.epoch:
            self.epoch, self._done = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position: epochs completed, and units of the current one."""
        return {"epoch": self.epoch, "done": self._done, "data": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last step received when ``state`` was taken, also on another number of ranks."""
        check_same_data(state, self._fingerprint)
        self.epoch, self._done = int(state["epoch"]), int(state["done"])

    @property
    def _fingerprint(self) -> dict[str, Any]:
        return {"kind": "batches" if self._ready else "samples", "length": len(self._units), "seed": self._seed}


@dataclass
class _Plan:
    """The sampler of the rebuilt loader: starts at the current position whenever an iteration starts."""

    indices: Callable[[], Iterator[Any]]

    def __iter__(self) -> Iterator[Any]:
        return self.indices()
