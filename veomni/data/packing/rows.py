"""Rows of samples as the tensors a model takes: see ``veomni/batch/micro_batch.py`` for the format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from veomni.batch.documents import RowLayout
from veomni.batch.fields import IGNORE_INDEX
from veomni.batch.micro_batch import MicroBatch
from veomni.batch.split import SequenceShard
from veomni.data.text.on_overflow import Samples
from veomni.data.text.token_cache import TokenizedDocuments
from veomni.data.text.tokens import Tokens

_SEGMENT_BUCKET = 64

Rows = Sequence[NDArray[np.int64]]


class MicroBatches(Dataset[MicroBatch]):
    """Makes a micro-batch from the sample indices of its rows; what loader workers hold.

    Args:
        documents: The tokens.
        samples: The pieces of documents that the indices count.
        capacity: Tokens of a row.
        pad_token_id: Fills the tail of a row.
        shard: Which positions of the rows are given out.
    """

    def __init__(
        self, documents: TokenizedDocuments, samples: Samples, capacity: int, pad_token_id: int, shard: SequenceShard
    ) -> None:
        self.documents, self.samples = documents, samples
        self.capacity, self.pad_token_id = capacity, pad_token_id
        self.shard = shard

    def __getitem__(self, rows: Rows) -> MicroBatch:
        """Return ``[batch, seq]`` tensors for ``rows``, each the indices of its samples; a row may be empty."""
        documents = [[self._document(int(sample)) for sample in samples] for samples in rows]
        return pack_rows(documents, self.capacity, self.pad_token_id).split(self.shard)

    def _document(self, sample: int) -> Tokens:
        taken = (column[sample] for column in (self.samples.document, self.samples.start, self.samples.length))
        return self.documents.part(*map(int, taken))


def pack_rows(rows: Sequence[Sequence[Tokens]], capacity: int, pad_token_id: int) -> MicroBatch:
    """Return ``[batch, seq]`` tensors for rows of documents; a row may be empty.

    Args:
        rows: The documents of each row, at most ``capacity`` tokens together.
        capacity: Tokens of a row.
        pad_token_id: Fills the tail of a row.
    """
    shape = (len(rows), capacity)
    ids = np.full(shape, pad_token_id, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    positions = np.empty(shape, np.int64)
    weighed: NDArray[np.float32] | None = None
    segments: list[int] = []
    lengths: list[int] = []
    filled: list[int] = []
    for row, documents in enumerate(rows):
        at = 0
        for tokens in documents:
            stop = at + len(tokens)
            ids[row, at:stop] = labels[row, at:stop] = tokens.ids
            if tokens.weights is not None:
                labels[row, at:stop][tokens.weights == 0] = IGNORE_INDEX
            if tokens.fractional:
                weighed = np.ones(shape, np.float32) if weighed is None else weighed
                weighed[row, at:stop] = tokens.weights
            labels[row, at] = IGNORE_INDEX  # it would be predicted from the document before
            positions[row, at:stop] = np.arange(stop - at)
            lengths.append(stop - at)
            at = stop
        segments += lengths[len(lengths) - len(documents) :]
        filled.append(at)
        if at < capacity:
            segments.append(capacity - at)
            positions[row, at:] = np.arange(capacity - at)
    tensors = {"input_ids": ids, "labels": labels, "position_ids": positions}
    fields: dict[str, Any] = {name: torch.from_numpy(array) for name, array in tensors.items()}
    if weighed is not None and (weighed[labels != IGNORE_INDEX] != 1).any():
        fields["loss_weights"] = torch.from_numpy(weighed)
    if len(segments) != len(rows):  # otherwise nothing is to be kept apart: attention may take a dense kernel
        fields |= segment_offsets(segments, capacity)
    return MicroBatch.of_fields(fields, RowLayout(tuple(lengths), tuple(filled)))


def segment_offsets(segments: list[int], capacity: int) -> dict[str, Any]:
    """Return what variable-length attention takes.

    Both the number of offsets and the longest length are rounded up, so that kernels and graphs are compiled for few of
    them: the last offset is repeated (segments of no tokens), and the length becomes a power of two, or the row's.
    """
    entries = -(-(len(segments) + 1) // _SEGMENT_BUCKET) * _SEGMENT_BUCKET
    offsets = torch.full((entries,), sum(segments), dtype=torch.int32)
    offsets[: len(segments) + 1] = torch.from_numpy(np.concatenate([[0], np.cumsum(segments)]))
    longest = min(capacity, 1 << (max(segments) - 1).bit_length())
    return {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets.clone(),
        "max_length_q": longest,
        "max_length_k": longest,
    }
