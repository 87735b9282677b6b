"""What a loader is composed of: how rows are packed, ordered, dealt to ranks, and prepared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from veomni.batch.split import WHOLE_ROWS, SequenceShard
from veomni.config.section import Validated
from veomni.errors import LayoutError
from veomni.logging import create_logger

logger = create_logger(__name__)

Sampling = Literal["sample", "token"]
StoppingStrategy = Literal["repeat", "first_exhausted", "all_exhausted", "once"]


@dataclass(frozen=True)
class Mixing(Validated):
    """How several sources become one stream.

    Attributes:
        sampling: Whether weights of sources are shares of the samples or of their tokens.
        stopping_strategy: When the stream ends: ``repeat``, never; ``first_exhausted``, when a source has been read
            ``epochs`` times and is due again; ``all_exhausted``, when each has been read that often, shorter ones more
            often; ``once`` likewise, but no source is read more often.
    """

    sampling: Sampling = "sample"
    stopping_strategy: StoppingStrategy = "repeat"


@dataclass(frozen=True)
class Packing(Validated):
    """How documents are put into rows.

    Attributes:
        max_seq_len: Tokens of a row.
        strategy: ``best_fit`` puts several documents into a row, kept apart; ``none`` gives each its own.
        on_overflow: What happens to documents longer than a row: ``error``, ``truncate``, ``split`` or ``drop``; all
            but ``error`` are counted and logged.
        lookahead: Samples that each virtual shard of a stream reads ahead to fill its rows from.
        max_media_tokens: Most tokens of a stream's row that stand for images, videos and audio; None sets no bound.
    """

    max_seq_len: Annotated[int, Ge(2)] = 2048
    strategy: Literal["best_fit", "none"] = "best_fit"
    on_overflow: Literal["error", "truncate", "split", "drop"] = "error"
    lookahead: Annotated[int, Ge(1)] = 256
    max_media_tokens: Annotated[int, Ge(1)] | None = None

    @property
    def packs(self) -> bool:
        """Whether several samples may share a row."""
        return self.strategy != "none"


@dataclass(frozen=True)
class Order(Validated):
    """In which order documents are read, and how often.

    Attributes:
        seed: Decides the order, together with the epoch.
        shuffle: Read documents in an order drawn from seed and epoch; otherwise in the order of the files.
        epochs: How often the data is read; None repeats it without end.
        stream_shards: Virtual shards of a stream, each with an order and rows of its own, whatever the number of ranks;
            a multiple of the data ranks.
        held_out: One pass in the order of the files, from the start at each iteration.
    """

    seed: int = 0
    shuffle: bool = True
    epochs: Annotated[int, Ge(1)] | None = None
    stream_shards: Annotated[int, Ge(1)] = 32
    held_out: bool = False

    def resolved(self) -> Order:
        """Return the order with what ``held_out`` implies for the other fields."""
        return replace(self, shuffle=False, epochs=1, stream_shards=1) if self.held_out else self


@dataclass(frozen=True)
class BatchShape(Validated):
    """Rows of a step, and which of them this rank computes (LayoutError: the batch sizes do not divide).

    Attributes:
        micro_batch_size: Rows of a micro-batch.
        global_batch_size: Rows of an optimizer step, over all ranks and micro-batches.
        rank: This process's place among the ranks that read different rows (``launcher.data_parallel``).
        size: Number of those ranks.
        shard: The positions of its rows that this rank holds, where several ranks share each row
            (``launcher.sequence_shard``).
        balance: Distribute the rows of a step by their cost, the squares of their documents' lengths.
    """

    micro_batch_size: Annotated[int, Ge(1)] = 1
    global_batch_size: Annotated[int, Ge(1)] = 1
    rank: Annotated[int, Ge(0)] = 0
    size: Annotated[int, Ge(1)] = 1
    shard: SequenceShard = WHOLE_ROWS
    balance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        multiple = self.size * self.micro_batch_size
        if self.global_batch_size % multiple:
            parts = f"{self.size} data ranks x micro_batch_size {self.micro_batch_size}"
            problem = f"global_batch_size {self.global_batch_size} is no multiple of {parts}"
            field = "BatchShape.global_batch_size BatchShape.micro_batch_size"
            raise LayoutError(problem, f"use a multiple of {multiple}", field)


@dataclass(frozen=True)
class Workers(Validated):
    """Processes that prepare micro-batches ahead of the loop; the batches do not depend on them.

    Attributes:
        count: Processes per rank that prepare micro-batches; 0 prepares micro-batches in the loop.
        prefetch_factor: Micro-batches that each process keeps ready.
        pin_memory: Copy micro-batches to page-locked memory while the step before them runs, not when they are moved to
            the device; ``auto`` where there is an accelerator.
        timeout: Seconds after which a process that returns nothing is an error.
    """

    count: Annotated[int, Ge(0)] = 0
    prefetch_factor: Annotated[int, Ge(1)] = 2
    pin_memory: bool | Literal["auto"] = "auto"
    timeout: Annotated[float, Gt(0)] = 300.0

    @property
    def pins(self) -> bool:
        """Whether micro-batches are copied to page-locked memory on this machine."""
        import torch

        available = torch.accelerator.is_available()
        if self.pin_memory is True and not available:
            logger.warning_once("pin_memory is ignored: there is no accelerator to copy to")
        return available and self.pin_memory is not False
