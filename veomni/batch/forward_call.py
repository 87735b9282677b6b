"""The forward that a model is in: what attention, masks, encoders and losses read and a model does not pass on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from veomni.batch.micro_batch import MicroBatch
from veomni.batch.split import SequenceShard
from veomni.compat.collectives import group_key


@dataclass(frozen=True)
class SequenceGroups:
    """The ranks that share the rows of a model: all, those that exchange sequence for heads, and those of the ring."""

    shard: SequenceShard
    ranks: ProcessGroup
    ulysses: ProcessGroup | None = None
    ring: ProcessGroup | None = None
    key: str = field(init=False)
    """What compiled graphs are guarded by; see :func:`~veomni.compat.collectives.group_key`."""

    def __post_init__(self) -> None:
        groups = [group for group in (self.ulysses, self.ring) if group is not None]
        object.__setattr__(self, "key", ", ".join(map(group_key, groups)) or "none")


@dataclass(frozen=True)
class Documents:
    """The documents of the rows that a model is called with, whole rows even where this rank computes on a shard.

    Attributes:
        numbers: The number of each token's document, int64 ``[batch, seq]``; None where each row is one document.
        boundaries: Offsets of documents into the flattened rows, int32 ``[documents + 1]``; None where not given.
        longest: At least the tokens of the longest document; 0 where not given.
        encoders: Configuration classes of encoders, whose masks are not of these rows.
    """

    numbers: Tensor | None
    boundaries: Tensor | None = None
    longest: int = 0
    encoders: frozenset[type] = frozenset()

    def numbers_for(self, config: Any, batch: int | None, length: int | None) -> Tensor | None:
        """Return :attr:`numbers` for a mask of ``length`` positions in the part of a model with ``config``.

        None where that is an encoder, or the mask is of other rows.
        """
        numbers = None if type(config) in self.encoders else self.numbers
        return numbers if numbers is not None and numbers.shape == (batch, length) else None

    @property
    def positions(self) -> Tensor:
        """Each token's place in its document, int64 ``[batch, seq]``; defined for packed rows."""
        numbers = self.numbers
        assert numbers is not None
        place = torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers)
        starts = torch.diff(numbers, prepend=numbers[:, :1] - 1, dim=-1) != 0
        return place - torch.where(starts, place, 0).cummax(-1).values


@dataclass
class ForwardCall:
    """One forward of an adapted module, from its pre-hook to its post-hook.

    Attributes:
        owner: The adapter of the model.
        args: Positional arguments, which passes may replace, as they may change ``kwargs``.
        micro: The micro-batch that the model is called with, without inputs; None for other arguments.
        sequence: The ranks that share the model's rows; None where rows are whole.
        documents: The documents of the rows; None where they are not known: rows are padded, say.
        shift_labels: Labels that are shifted already, int64 ``[batch, seq]``; None where the loss shifts them.
        fused: Whether the head passes hidden states on to the loss.
    """

    owner: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    micro: MicroBatch | None = None
    sequence: SequenceGroups | None = None
    documents: Documents | None = None
    shift_labels: Tensor | None = None
    fused: bool = False


# Functions registered with transformers are constant and read it: models with other groups may coexist.
_current: ContextVar[ForwardCall | None] = ContextVar("veomni_forward_call", default=None)


def current_call() -> ForwardCall | None:
    """Return the innermost forward of an adapted module in this thread; None outside of all."""
    return _current.get()


@contextmanager
def forward_call(call: ForwardCall | None) -> Iterator[None]:
    """Run the body in ``call``."""
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)


def bind_call(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``forward`` bound to the call it is in now, for a recomputation that runs outside of it."""
    call = _current.get()
    if call is None:
        return forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with forward_call(call):
            return forward(*args, **kwargs)

    return run
