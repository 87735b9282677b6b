"""What both loaders share: options, a fingerprint of what their rows depend on, and states that are validated."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veomni.batch.micro_batch import MicroBatch
from veomni.data.options import BatchShape, Order, Packing, Workers
from veomni.errors import CheckpointError


class ResumableLoader(ABC):
    """Yields, per optimizer step, this rank's list of micro-batches; its state is counters, never samples.

    Iterating continues from the state to the end of the data; a held-out loader reads all its data, once, every time.

    A state is rejected where ``fingerprint``, what else the rows depend on by name, differs.

    Attributes:
        steps_per_epoch: Optimizer steps of one epoch; None, as the others, where it is unknown before all is read.
        sample_lengths: Tokens of each sample; int64 ``[samples]``.
        fill: Share of the rows' tokens that are not padding, between 0 and 1.
    """

    steps_per_epoch: int | None = None
    sample_lengths: NDArray[np.int64] | None = None
    fill: float = 0.0

    def __init__(
        self, packing: Packing, order: Order, shape: BatchShape, workers: Workers, fingerprint: Mapping[str, Any]
    ) -> None:
        self.packing, self.order, self.shape, self.workers = packing, order, shape, workers
        self._pins, self._step = workers.pins, 0
        self._fingerprint: dict[str, Any] = dict(fingerprint) | {
            "max_seq_len": packing.max_seq_len, "global_batch_size": shape.global_batch_size, "seed": order.seed,
            "shuffle": order.shuffle, "packing": packing.strategy, "on_overflow": packing.on_overflow,
        }  # fmt: skip

    @property
    def remaining_steps(self) -> int | None:
        """Optimizer steps until the data ends; None if it never ends, or if that is unknown."""
        return None

    @property
    def exhausted(self) -> bool:
        """Whether this rank has no data left, and further steps hold empty rows."""
        return False

    @abstractmethod
    def __iter__(self) -> Iterator[list[MicroBatch]]: ...

    def state_dict(self) -> dict[str, Any]:
        """Return what the loop has received, whatever workers have prefetched."""
        return {"step": self._step, **self._progress(), "fingerprint": dict(self._fingerprint)}

    @staticmethod
    def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return one state from those of all ranks, from which any number of ranks resumes."""
        return dict(states[0])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last step received when ``state`` was taken, also on another number of ranks.

        A CheckpointError names what changed where the state belongs to other data, or to another order of it.
        """
        try:
            if changed := _changes(state["fingerprint"], self._fingerprint):
                problem = f"the data differs from the checkpoint's: {'; '.join(changed)}"
                raise CheckpointError(problem, "restore the data, or start a new run")
            self._restore(int(state["step"]), state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the loader's state is incomplete: {error!r}", "use another checkpoint") from error

    @abstractmethod
    def _progress(self) -> dict[str, Any]:
        """Return what the state holds beside the number of steps."""

    def _restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Continue after ``step`` steps; raises KeyError and the like where the state is malformed."""
        if step < 0:
            raise ValueError(f"step {step}")
        self._step = step

    def _pinned(self, batch: MicroBatch) -> MicroBatch:
        """Return a micro-batch, in page-locked memory where the loader uses that."""
        return batch.pin_memory() if self._pins else batch


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for name in {**now, **saved}:
        then, here = saved.get(name), now.get(name)
        if name == "sources" and isinstance(then, dict) and isinstance(here, dict):
            found += [_source_change(source, then.get(source), here.get(source)) for source in {**then, **here}
                      if then.get(source) != here.get(source)]  # fmt: skip
        elif then != here:
            found.append(f"{name} ({then!r} then, {here!r} now)")
    return found


def _source_change(name: str, then: Any, now: Any) -> str:
    if not isinstance(then, dict) or not isinstance(now, dict):
        return f"source {name!r} is {'new' if isinstance(now, dict) else 'gone'}"
    sizes = [f"{facts.get('files')} files of {facts.get('bytes')} bytes" for facts in (then, now)]
    verb = "has shrunk" if now.get("bytes", 0) < then.get("bytes", 0) else "has changed"
    return f"source {name!r} {verb} ({sizes[0]} then, {sizes[1]} now)"
