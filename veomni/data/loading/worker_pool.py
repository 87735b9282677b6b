"""Worker processes that make micro-batches, or rows of a stream, ahead of the loop and in its order.

They send arrays through the pipe, not tensors: for a tensor in shared memory the loop would connect to the worker once
more, without a timeout, so a worker that hangs would hang the run.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from veomni.batch.micro_batch import MicroBatch
from veomni.data.options import Workers
from veomni.errors import InputError, VeOmniError

T = TypeVar("T")


class WorkerError(VeOmniError):
    """A loader worker died, or returned nothing before the timeout; the message names the processes."""


class WorkerPool(Generic[T]):
    """An iterator over what worker processes make, each with a copy of ``dataset``.

    ``requests`` are the arguments of the dataset, read ahead of the loop; None is for one that is iterated.
    """

    def __init__(self, dataset: Dataset[T], requests: Iterator[Any] | None, workers: Workers) -> None:
        loader: DataLoader[T] = DataLoader(
            dataset, batch_size=None, sampler=requests, collate_fn=_arrays, num_workers=workers.count,
            prefetch_factor=workers.prefetch_factor, timeout=workers.timeout, worker_init_fn=_start,
            # It draws a number when it starts: from its own generator, or the run's dropout would change.
            generator=torch.Generator(),
        )  # fmt: skip
        before = multiprocessing.active_children()
        with _tokenizers_serial():
            self._source = iter(loader)
        self._processes = [child for child in multiprocessing.active_children() if child not in before]

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """Return what the workers make next (WorkerError: a worker died, or nothing arrived in time)."""
        try:
            made: T = received(next(self._source))
            return made
        except InputError:
            self._kill()  # it waits for a request, ignores SIGTERM, and would be joined when this process ends
            raise
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            names = ", ".join(f"{process.name} (pid {process.pid})" for process in self._processes)
            self._kill()
            raise WorkerError(f"{error}; the loader's workers are {names}") from error

    def _kill(self) -> None:
        # One that hangs would keep this process from ending. torch raises here, too, when a worker has died.
        for process in self._processes:
            with suppress(RuntimeError):
                process.kill()
                process.join()


def _arrays(made: Any) -> Any:
    return made.map(Tensor, Tensor.numpy) if isinstance(made, MicroBatch) else made


def received(made: Any) -> Any:
    """Return what a worker sent, an InputError raised: torch would make a RuntimeError of it."""
    if isinstance(made, InputError):
        raise made
    return made.map(np.ndarray, torch.from_numpy) if isinstance(made, MicroBatch) else made


def _start(worker: int) -> None:
    # Signals are sent to the whole process group: the training process saves first, and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_rank, daemon=True).start()


def _end_with_the_rank() -> None:
    # torch's workers detect that their rank is gone, but then block until their arrays are taken.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _tokenizers_serial() -> Iterator[None]:
    """Disable the threads of the tokenizers library, and its warning, in processes forked meanwhile."""
    name, before = "TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ.setdefault(name, "false")
    yield
    if before is None:
        del os.environ[name]
