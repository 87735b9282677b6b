"""Steps of a torch ``DataLoader`` over an iterable dataset: every data rank takes its share of each worker's stream."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from veomni.batch.micro_batch import MicroBatch
from veomni.loop.dealing import Deal, check_same_data, options_of


class StreamedSteps:
    """Yields, per optimizer step, this data rank's list of micro-batches; one iteration is an epoch.

    Rank r takes items r, r + size, ... of the stream of each worker; with several workers, the dataset splits itself by
    worker, as torch requires. Micro-batches that a rank lacks at the end are fillers of weight 0, copies of its latest;
    ``exhausted`` is true while the step in hand holds nothing else. ``epoch`` counts the epochs completed.
    """

    steps_per_epoch: int | None = None
    remaining_steps: int | None = None

    def __init__(self, loader: DataLoader[Any], deal: Deal) -> None:
        self._given, self._deal = loader, deal
        self._batch = deal.batch_size * deal.size
        self.epoch, self.exhausted = 0, False
        self._restart()

    def _restart(self) -> None:
        self._received = [0] * max(1, self._given.num_workers)  # items of each worker's stream, over all ranks
        self._next_worker = 0

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        batches, size = self._open(), self._deal.accumulate
        spare = self._given.num_workers + 1  # ranks differ by a batch of each worker at most
        latest: Any = None
        try:
            while spare:
                found = list(islice(batches, size))
                latest = found[-1] if found else latest
                if latest is None:
                    break
                self.exhausted, spare = not found, spare - (not found)
                for _ in range(size):
                    self._received[self._next_worker] += self._batch
                    self._next_worker = (self._next_worker + 1) % len(self._received)
                fillers = [MicroBatch.of(latest, samples=0)] * (size - len(found))
                yield [*(MicroBatch.of(batch) for batch in found), *fillers]
        finally:  # also where a loop that ended on all ranks leaves this generator
            if self.exhausted or latest is None:
                self.set_epoch(self.epoch + 1)

    def _open(self) -> Iterator[Any]:
        """Start the workers where they were; those before the next one in turn repeat a batch, which is dropped."""
        before = self._received[: self._next_worker]
        repeats = self._next_worker if min(before, default=0) >= self._batch else 0
        skipped = [count - self._batch * (worker < repeats) for worker, count in enumerate(self._received)]
        self._next_worker = repeats
        dataset = DealtStream(self._given.dataset, self._deal.rank, self._deal.size, skipped, self.epoch)
        options = options_of(self._given) | {"persistent_workers": False}
        loader = DataLoader(dataset, batch_size=self._given.batch_size, drop_last=self._given.drop_last, **options)
        return islice(iter(loader), repeats, None)

    def set_epoch(self, epoch: int) -> None:
        """Continue with ``epoch``, from its beginning unless it is the current one."""
        self.exhausted = False
        if epoch != self.epoch:
            self.epoch = epoch
            self._restart()

    def state_dict(self) -> dict[str, Any]:
        """Return the position: epochs completed, and how much of each worker's stream all ranks received."""
        received = list(self._received)
        return {"epoch": self.epoch, "received": received, "next": self._next_worker, "data": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last step received when ``state`` was taken, also on another number of ranks."""
        check_same_data(state, self._fingerprint)
        self.epoch, self._received, self._next_worker = int(state["epoch"]), list(state["received"]), int(state["next"])

    @property
    def _fingerprint(self) -> dict[str, Any]:
        return {"kind": "stream", "workers": self._given.num_workers}


class DealtStream(IterableDataset[Any]):
    """Items ``skipped[worker] + rank``, ``+ size``, ``+ 2 * size``, ... of each worker's stream of ``dataset``.

    Other attributes are those of the dataset: a ``worker_init_fn`` may read and set them.
    """

    def __init__(self, dataset: Any, rank: int, size: int, skipped: Sequence[int], epoch: int) -> None:
        self.__dict__.update(_dataset=dataset, _rank=rank, _size=size, _skipped=skipped, _epoch=epoch)

    def __iter__(self) -> Iterator[Any]:
        own, worker = self.__dict__, get_worker_info()
        if hasattr(own["_dataset"], "set_epoch"):
            own["_dataset"].set_epoch(own["_epoch"])
        start = own["_skipped"][0 if worker is None else worker.id] + own["_rank"]
        return islice(iter(own["_dataset"]), start, None, own["_size"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_dataset"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_dataset"], name, value)
