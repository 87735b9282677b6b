"""What a training loop relies on: loaders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from veomni.batch.micro_batch import MicroBatch


@runtime_checkable
class Loader(Protocol):
    """Iterates over optimizer steps, each the list of this data rank's micro-batches.

    Attributes:
        steps_per_epoch: Optimizer steps of an epoch; None where it is unknown before all data has been read.
    """

    steps_per_epoch: int | None

    @property
    def remaining_steps(self) -> int | None:
        """Optimizer steps until the data ends; None if it never ends, or if that is unknown."""

    @property
    def exhausted(self) -> bool:
        """Whether this rank has no data left: steps that the loader still yields hold empty rows."""

    def __iter__(self) -> Iterator[list[MicroBatch]]: ...

    def state_dict(self) -> dict[str, Any]:
        """Return how much data the loop has received, as numbers and text."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last step received when ``state`` was taken, on any number of data ranks."""

    @staticmethod
    def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return one state from those of all ranks, in order of rank."""
