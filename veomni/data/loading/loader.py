"""The loader: this rank's share of every optimizer step, in an order that no layout changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veomni.batch.micro_batch import MicroBatch
from veomni.data.loading.workers import Workers
from veomni.data.packing.balance import balanced_share
from veomni.data.packing.best_fit import Bins, epoch_bins
from veomni.data.packing.rows import MicroBatches, Rows
from veomni.errors import CheckpointError, LayoutError
from veomni.logging import create_logger

logger = create_logger(__name__)


@dataclass(frozen=True)
class LoaderSettings:
    """What a loader is told; see :func:`veomni.data.loading.build_dataloader`."""

    rank: int
    size: int
    micro_batch_size: int
    global_batch_size: int
    seed: int
    shuffle: bool
    packing: str
    overlong: str
    num_workers: int
    prefetch_factor: int
    pin_memory: bool
    epochs: int | None
    train: bool
    worker_timeout: float
    balance: bool = False

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.size * self.micro_batch_size):
            raise LayoutError(
                f"train.global_batch_size {self.global_batch_size} is no multiple of "
                f"{self.size} data ranks x train.micro_batch_size {self.micro_batch_size}",
                f"use a multiple of {self.size * self.micro_batch_size}",
            )


class PackedDataLoader:
    """Yields, per optimizer step, this rank's list of micro-batches.

    Of the ``global_batch_size`` rows of a step, rank r of n takes rows r, r + n, ... and cuts them into micro-batches.
    The last step of an epoch is filled with empty rows, so every rank has the same number of micro-batches and no
    sample is left out. Iterating goes on from where the state stands, to the end of the last epoch; a held-out loader
    (``train=False``) instead reads all its data, once, every time.

    Args:
        batches: Makes micro-batches from sample indices.
        settings: Sizes, order and workers.
        fingerprint: Digests of the data, by name: a state is refused where they differ.

    Attributes:
        steps_per_epoch: Optimizer steps of one epoch; the same in every epoch.
        fill: Share of the rows' tokens that are not padding, between 0 and 1.
    """

    def __init__(self, batches: MicroBatches, settings: LoaderSettings, fingerprint: Mapping[str, str]) -> None:
        self._batches, self._settings = batches, settings
        self._bins = lru_cache(maxsize=2)(self._plan)  # the epoch being read, and the one being prefetched
        self._fingerprint: dict[str, Any] = dict(fingerprint) | {
            "max_seq_len": batches.capacity, "global_batch_size": settings.global_batch_size, "seed": settings.seed,
            "shuffle": settings.shuffle, "packing": settings.packing, "overlong": settings.overlong,
        }  # fmt: skip
        rows = len(self._bins(0))
        self.steps_per_epoch = -(-rows // settings.global_batch_size)
        self.fill = float(batches.samples.length.sum() / (rows * batches.capacity))
        self._epoch = self._step = 0
        self._report(rows)

    def _report(self, rows: int) -> None:
        logger.info_rank0(
            "%s samples in %s rows of %s tokens, %.2f %% filled; %s steps per epoch", len(self._batches.samples), rows,
            self._batches.capacity, 100 * self.fill, self.steps_per_epoch,
        )  # fmt: skip
        empty = self.steps_per_epoch * self._settings.global_batch_size - rows
        if empty and self._settings.train:
            logger.info_rank0("the last step of an epoch is filled with %s empty rows", empty)

    def __len__(self) -> int:
        """Return the optimizer steps of one epoch."""
        return self.steps_per_epoch

    @property
    def sample_lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample; int64 ``[samples]``."""
        return self._batches.samples.length

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._epoch

    @property
    def remaining_steps(self) -> int | None:
        """Optimizer steps until the data ends; None if it never does."""
        epochs = self._settings.epochs
        return None if epochs is None else max(0, (epochs - self._epoch) * self.steps_per_epoch - self._step)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        if not self._settings.train:
            self._epoch = self._step = 0
        source = self._start()
        while self.remaining_steps != 0:
            step = [next(source) for _ in range(self._micro_batches(self._step))]
            self._advance()  # before the yield: a state taken in the loop's body says that this step was received
            yield step

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return counters, never samples: how far the consumer has come, whatever workers have prefetched."""
        received = min(self._step * self._settings.global_batch_size, len(self._bins(self._epoch)))
        samples = self._epoch * len(self._batches.samples) + int(self._bins(self._epoch).offsets[received])
        return {
            "seed": self._settings.seed, "epoch": self._epoch, "step_in_epoch": self._step, "samples": samples,
            "fingerprint": dict(self._fingerprint),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the last step received when ``state`` was taken, also on another number of ranks.

        Raises:
            CheckpointError: the state belongs to other data, or to another order of it; names what changed.
        """
        try:
            saved, epoch, step = dict(state["fingerprint"]), int(state["epoch"]), int(state["step_in_epoch"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the loader's state is incomplete: {error!r}", "use another checkpoint") from error
        now = self._fingerprint
        changed = [
            f"{name} ({saved.get(name)!r} then, {now.get(name)!r} now)"
            for name in {**now, **saved}
            if saved.get(name) != now.get(name)
        ]
        if changed:
            problem = f"the data differs from the checkpoint's: {', '.join(changed)}"
            raise CheckpointError(problem, "put it back as it was, or start a run of its own")
        if not (epoch >= 0 and 0 <= step < self.steps_per_epoch):
            raise CheckpointError(
                f"the loader's state is out of range: step {step} of epoch {epoch}", "use another checkpoint"
            )
        self._epoch, self._step = epoch, step

    # ---------------------------------------------------------------- order

    def _plan(self, epoch: int) -> Bins:
        settings = self._settings
        return epoch_bins(
            self._batches.samples.length, self._batches.capacity, pack=settings.packing != "none",
            shuffle=settings.shuffle, seed=settings.seed, epoch=epoch,
        )  # fmt: skip

    def _micro_batches(self, step: int) -> int:
        """Return each rank's micro-batches in a step; a held-out loader's last step is no longer than need be."""
        settings = self._settings
        rows = settings.global_batch_size
        if not settings.train:
            rows = min(rows, len(self._bins(0)) - step * rows)
        return -(-rows // (settings.size * settings.micro_batch_size))

    def _requests(self) -> Iterator[Rows]:
        """Yield the rows of each of this rank's micro-batches from the current step on, as their sample indices."""
        epoch, step, settings = self._epoch, self._step, self._settings
        while settings.epochs is None or epoch < settings.epochs:
            bins = self._bins(epoch)
            for at in range(step, self.steps_per_epoch):
                mine = self._share(bins, at)
                for micro in range(self._micro_batches(at)):
                    chosen = mine[micro * settings.micro_batch_size : (micro + 1) * settings.micro_batch_size]
                    yield [bins[row] if row < len(bins) else bins.samples[:0] for row in chosen]
            epoch, step = epoch + 1, 0

    def _share(self, bins: Bins, step: int) -> Sequence[int]:
        """Return the rows of a step that are this rank's, in order."""
        settings = self._settings
        rows = range(step * settings.global_batch_size, (step + 1) * settings.global_batch_size)
        if not (settings.balance and settings.train):
            return rows[settings.rank :: settings.size]
        squares = self._batches.samples.length**2
        costs = np.array([squares[bins[row]].sum() if row < len(bins) else 0 for row in rows])
        share = balanced_share(costs, settings.rank, settings.size, settings.micro_batch_size)
        return [rows[index] for index in share.tolist()]

    def _advance(self) -> None:
        self._step += 1
        if self._step == self.steps_per_epoch:
            self._epoch, self._step = self._epoch + 1, 0

    def _start(self) -> Iterator[MicroBatch]:
        settings = self._settings
        stream: Iterator[MicroBatch] = (self._batches[rows] for rows in self._requests())
        if settings.num_workers:
            stream = Workers(
                self._batches, self._requests(), count=settings.num_workers,
                prefetch_factor=settings.prefetch_factor, timeout=settings.worker_timeout,
            )  # fmt: skip
        return map(MicroBatch.pin_memory, stream) if settings.pin_memory else stream
