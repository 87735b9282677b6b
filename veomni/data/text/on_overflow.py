"""Documents longer than a row: an error, truncated, split or dropped; the log counts them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from veomni.errors import DataError
from veomni.logging import create_logger

logger = create_logger(__name__)

_FIELDS = "Packing.max_seq_len Packing.on_overflow"


@dataclass(frozen=True)
class Samples:
    """Pieces of documents, each at most a row: document, first token in it and tokens; int64 ``[samples]`` each."""

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.document)


def cut_to_rows(lengths: NDArray[np.int64], capacity: int, policy: str, where: Callable[[int], str]) -> Samples:
    """Return samples of at most ``capacity`` tokens of documents of ``lengths`` tokens; ``where`` names a document.

    Of a longer document, ``truncate`` keeps the first tokens; ``split`` makes pieces of ``capacity`` tokens and a rest,
    each a document of its own; ``drop`` leaves it out; ``error``, and a drop that leaves none, is a DataError.
    """
    longer = np.flatnonzero(lengths > capacity)
    pieces = np.ones_like(lengths)
    if policy == "split":
        pieces = -(-lengths // capacity)
    elif policy == "drop":
        pieces[longer] = 0
    document = np.repeat(np.arange(len(lengths)), pieces)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * capacity
    if len(longer):
        _report(longer, lengths, capacity, policy, where)
    return Samples(document, start, np.minimum(lengths[document] - start, capacity))


def _report(
    longer: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int, policy: str, where: Callable[[int], str]
) -> None:
    if policy == "error":
        raise_overflow(where(int(longer[0])), int(lengths[longer[0]]), capacity, len(longer))
    elif policy == "split":
        logger.info_rank0("split %s documents longer than %s tokens into rows", len(longer), capacity)
    elif policy == "truncate":
        lost = int((lengths[longer] - capacity).sum())
        logger.warning_rank0("truncated %s documents to %s tokens: %s tokens lost", len(longer), capacity, lost)
    elif len(longer) == len(lengths):
        problem = f"every document is longer than max_seq_len {capacity}"
        raise DataError(problem, "raise it, or set on_overflow to split", _FIELDS)
    else:
        logger.warning_rank0("dropped %s documents longer than %s tokens", len(longer), capacity)


def raise_overflow(
    where: str, tokens: int, capacity: int, documents: int | None = None, *, policies: str = "split, truncate or drop"
) -> NoReturn:
    """Raise DataError for the document called ``where``, one of so many ``documents`` if that is known.

    The message names the ``policies`` under which it would be no error.
    """
    such = f" ({documents} such documents)" if documents is not None else ""
    problem = f"{where}: {tokens} tokens, more than max_seq_len {capacity}{such}"
    raise DataError(problem, f"raise max_seq_len, or set on_overflow to {policies}", _FIELDS)
