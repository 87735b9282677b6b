"""Worker processes that make micro-batches ahead of the loop, in the order they are asked for.

They send arrays through the pipe, not tensors: for a tensor in shared memory the loop would connect to the worker once
more, without a timeout, so a worker that hangs would hang the run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from veomni.data.rows import MicroBatches, MicroBatchInputs, Rows, with_values
from veomni.errors import VeOmniError


class WorkerError(VeOmniError):
    """A loader worker died, or gave nothing for too long; the message names the processes."""


class Workers:
    """An iterator over the micro-batches of ``requests``, made by worker processes.

    Args:
        batches: Makes a micro-batch; every worker has a copy.
        requests: The rows of each micro-batch, read ahead of the loop.
        count: Number of processes.
        prefetch_factor: Micro-batches that each keeps ready.
        timeout: Seconds to wait for a micro-batch before it is an error.
    """

    def __init__(
        self,
        batches: MicroBatches,
        requests: Iterator[Rows],
        *,
        count: int,
        prefetch_factor: int,
        timeout: float,
    ) -> None:
        loader: DataLoader[MicroBatchInputs] = DataLoader(
            batches, batch_size=None, sampler=requests, collate_fn=_arrays, num_workers=count,
            prefetch_factor=prefetch_factor, timeout=timeout, worker_init_fn=_ignore_signals,
            # It draws a number when it starts: from a generator of its own, or the run's dropout would change.
            generator=torch.Generator(),
        )  # fmt: skip
        before = multiprocessing.active_children()
        with _tokenizers_serial():
            self._source = iter(loader)
        self._processes = [child for child in multiprocessing.active_children() if child not in before]

    def __iter__(self) -> Iterator[MicroBatchInputs]:
        return self

    def __next__(self) -> MicroBatchInputs:
        """Return the next micro-batch.

        Raises:
            WorkerError: a worker died, or nothing came in time.
        """
        try:
            return _tensors(next(self._source))
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            names = ", ".join(f"{process.name} (pid {process.pid})" for process in self._processes)
            self._kill()
            raise WorkerError(f"{error}; the loader's workers are {names}") from error

    def _kill(self) -> None:
        # One that hangs would keep this process from ending. torch raises here, too, once it hears of a worker's death.
        for process in self._processes:
            with suppress(RuntimeError):
                process.kill()
                process.join()


def _arrays(batch: Any) -> Any:
    return with_values(batch, lambda value: value.numpy() if isinstance(value, Tensor) else value)


def _tensors(batch: MicroBatchInputs) -> MicroBatchInputs:
    return with_values(batch, lambda value: torch.from_numpy(value) if isinstance(value, np.ndarray) else value)


def _ignore_signals(worker: int) -> None:
    # They go to the whole process group: the training process saves first, and then ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _tokenizers_serial() -> Iterator[None]:
    """Have the tokenizers library start no threads in processes forked meanwhile, nor warn in each that it does not."""
    name, before = "TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ.setdefault(name, "false")
    yield
    if before is None:
        del os.environ[name]
