"""Documents longer than a row: refuse, cut, split or leave out, and say how many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from veomni.errors import ConfigError, DataError
from veomni.logging import create_logger
from veomni.registry import did_you_mean

logger = create_logger(__name__)

OVERLONG_POLICIES = ("error", "truncate", "split", "drop")


@dataclass(frozen=True)
class Samples:
    """Pieces of documents that each fit a row; int64 ``[samples]`` each.

    Attributes:
        document: Index of the tokenised document.
        start: First token of the piece in its document.
        length: Number of tokens.
    """

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.document)


def cut_to_rows(lengths: NDArray[np.int64], capacity: int, policy: str, where: Callable[[int], str]) -> Samples:
    """Return samples of at most ``capacity`` tokens.

    Args:
        lengths: Tokens of each document.
        capacity: Tokens of a row.
        policy: ``error``; ``truncate`` keeps the first ``capacity`` tokens; ``split`` makes pieces of ``capacity``
            tokens and a rest, each a document of its own; ``drop`` leaves the document out.
        where: Names a document by its index, for messages.

    Raises:
        DataError: a document is too long under ``error``, or ``drop`` leaves none.
        ConfigError: the policy is unknown.
    """
    check_policy(policy)
    overlong = np.flatnonzero(lengths > capacity)
    documents = np.arange(len(lengths))
    if not len(overlong):
        return Samples(documents, np.zeros_like(documents), lengths)
    if policy == "error":
        refuse_overlong(where(int(overlong[0])), int(lengths[overlong[0]]), capacity, len(overlong))
    lost = int((lengths[overlong] - capacity).sum())
    if policy == "split":
        logger.info_rank0("split %s documents longer than %s tokens into rows", len(overlong), capacity)
        return _split(lengths, capacity)
    if policy == "truncate":
        logger.warning_rank0("truncated %s documents to %s tokens: %s tokens lost", len(overlong), capacity, lost)
        return Samples(documents, np.zeros_like(documents), np.minimum(lengths, capacity))
    kept = np.delete(documents, overlong)
    if not len(kept):
        raise DataError(
            f"every document is longer than data.max_seq_len {capacity}", "raise it, or set data.overlong to split"
        )
    logger.warning_rank0("dropped %s documents longer than %s tokens", len(overlong), capacity)
    return Samples(kept, np.zeros_like(kept), lengths[kept])


def check_policy(policy: str) -> None:
    """Raise ConfigError unless ``policy`` is one of ``OVERLONG_POLICIES``."""
    if policy not in OVERLONG_POLICIES:
        fix = did_you_mean(policy, list(OVERLONG_POLICIES))
        raise ConfigError(f"data.overlong: no policy is called {policy!r}", fix)


def refuse_overlong(
    where: str, tokens: int, capacity: int, documents: int | None = None, *, helps: str = "split, truncate or drop"
) -> NoReturn:
    """Raise DataError for the document called ``where``.

    Args:
        where: File and record.
        tokens: Of the document.
        capacity: Tokens of a row.
        documents: How many are like it, if that is known.
        helps: Policies under which it would be no error.
    """
    such = f" ({documents} such documents)" if documents is not None else ""
    problem = f"{where}: {tokens} tokens, more than data.max_seq_len {capacity}{such}"
    raise DataError(problem, f"raise data.max_seq_len, or set data.overlong to {helps}")


def _split(lengths: NDArray[np.int64], capacity: int) -> Samples:
    pieces = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), pieces)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = (np.arange(len(document)) - first) * capacity
    return Samples(document, start, np.minimum(lengths[document] - start, capacity))
