"""The loader of tokenized data: this rank's share of every optimizer step, in an order that no layout changes."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from veomni.batch.micro_batch import MicroBatch
from veomni.data.loading.resumable import ResumableLoader
from veomni.data.loading.worker_pool import WorkerPool
from veomni.data.options import BatchShape, Order, Packing, Workers
from veomni.data.packing.balance import balanced_share
from veomni.data.packing.best_fit import Bins, epoch_bins
from veomni.data.packing.rows import MicroBatches, Rows
from veomni.logging import create_logger

logger = create_logger(__name__)


class PackedLoader(ResumableLoader):
    """Packs all samples of an epoch together.

    Of the ``global_batch_size`` rows of a step, rank r of n takes rows r, r + n, ... and cuts them into micro-batches.
    The last step of an epoch is filled with empty rows, so every rank has the same number of micro-batches and no
    sample is left out.
    """

    steps_per_epoch: int
    sample_lengths: NDArray[np.int64]

    def __init__(
        self, batches: MicroBatches, packing: Packing, order: Order, shape: BatchShape, workers: Workers,
        fingerprint: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(packing, order, shape, workers, fingerprint)
        self._batches, self.sample_lengths = batches, batches.samples.length
        self._bins = lru_cache(maxsize=2)(self._epoch_bins)  # the epoch being read, and the one being prefetched
        rows = len(self._bins(0))
        self.steps_per_epoch = -(-rows // shape.global_batch_size)
        self.fill = float(self.sample_lengths.sum() / (rows * packing.max_seq_len))
        logger.info_rank0(
            "%s samples in %s rows of %s tokens, %.2f %% filled; %s steps per epoch", len(batches.samples), rows,
            packing.max_seq_len, 100 * self.fill, self.steps_per_epoch,
        )  # fmt: skip
        empty = self.steps_per_epoch * shape.global_batch_size - rows
        if empty and not order.held_out:
            logger.info_rank0("the last step of an epoch is filled with %s empty rows", empty)

    def __len__(self) -> int:
        """Return the optimizer steps of one epoch."""
        return self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._step // self.steps_per_epoch

    @property
    @override
    def remaining_steps(self) -> int | None:
        epochs = self.order.epochs
        return None if epochs is None else max(0, epochs * self.steps_per_epoch - self._step)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        if self.order.held_out:
            self._step = 0
        micro_batches = self._micro_batches()
        while self.remaining_steps != 0:
            count = self._micro_batches_of(self._step % self.steps_per_epoch)
            step = [next(micro_batches) for _ in range(count)]
            self._step += 1  # before the yield: a state taken in the loop's body counts this step as received
            yield step

    @override
    def _progress(self) -> dict[str, Any]:
        epoch, step = divmod(self._step, self.steps_per_epoch)
        bins = self._bins(epoch)
        received = int(bins.offsets[min(step * self.shape.global_batch_size, len(bins))])
        return {"samples": epoch * len(self._batches.samples) + received}

    def _epoch_bins(self, epoch: int) -> Bins:
        order, packing = self.order, self.packing
        return epoch_bins(
            self.sample_lengths, packing.max_seq_len, pack=packing.packs, shuffle=order.shuffle, seed=order.seed,
            epoch=epoch,
        )  # fmt: skip

    def _micro_batches_of(self, step: int) -> int:
        """Return each rank's micro-batches in a step; the last step of held-out data is as short as possible."""
        shape, rows = self.shape, self.shape.global_batch_size
        if self.order.held_out:
            rows = min(rows, len(self._bins(0)) - step * rows)
        return -(-rows // (shape.size * shape.micro_batch_size))

    def _requests(self) -> Iterator[Rows]:
        """Yield the rows of each of this rank's micro-batches from the current step on, as their sample indices."""
        (epoch, step), size = divmod(self._step, self.steps_per_epoch), self.shape.micro_batch_size
        while self.order.epochs is None or epoch < self.order.epochs:
            bins = self._bins(epoch)
            for at in range(step, self.steps_per_epoch):
                mine = [bins[row] if row < len(bins) else bins.samples[:0] for row in self._share(bins, at)]
                yield from (mine[micro * size : (micro + 1) * size] for micro in range(self._micro_batches_of(at)))
            epoch, step = epoch + 1, 0

    def _share(self, bins: Bins, step: int) -> Sequence[int]:
        """Return this rank's rows of a step, in order."""
        shape = self.shape
        rows = range(step * shape.global_batch_size, (step + 1) * shape.global_batch_size)
        if not shape.balance or self.order.held_out:
            return rows[shape.rank :: shape.size]
        squares = self.sample_lengths**2
        costs = np.array([squares[bins[row]].sum() if row < len(bins) else 0 for row in rows])
        return [rows[index] for index in balanced_share(costs, shape.rank, shape.size).tolist()]

    def _micro_batches(self) -> Iterator[MicroBatch]:
        if not self.workers.count:
            return (self._pinned(self._batches[rows]) for rows in self._requests())
        return map(self._pinned, WorkerPool(self._batches, self._requests(), self.workers))
