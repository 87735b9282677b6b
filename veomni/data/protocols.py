"""What the parts of the data pipeline, and a training loop, rely on: documents, streams of them, and loaders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from veomni.batch.micro_batch import MicroBatch
    from veomni.data.sources.opened import Mixing, OpenedSource
    from veomni.data.sources.records import Document
    from veomni.data.sources.schema import RecordSchema


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


class DocumentStream(Protocol):
    """Documents of one or several sources, in order."""

    @property
    def indexed(self) -> Documents | None:
        """The same documents by index; None where they can only be streamed."""

    @property
    def sources(self) -> Sequence[OpenedSource]:
        """What is read, each with its weight and the schema of its records."""

    @property
    def mixing(self) -> Mixing:
        """How the sources become one stream."""

    def __iter__(self) -> Iterator[Document]: ...

    def texts(self) -> Iterator[str]:
        """Yield the texts that a tokenizer is trained on."""

    def fingerprint(self, cache_dir: Path) -> Any:
        """Return what changes when the documents do, as JSON can hold it."""


class Documents(DocumentStream, Protocol):
    """Documents of one source, by index.

    Attributes:
        schema: What its records hold, and in which fields.
    """

    schema: RecordSchema

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...
