"""Rows of samples as the tensors a model takes: see ``veomni/batch/micro_batch.py`` for the format."""

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
    """Makes a micro-batch, the ``shard`` of its rows, from the indices of their samples; what loader workers hold."""

    def __init__(
        self, documents: TokenizedDocuments, samples: Samples, capacity: int, pad_token_id: int, shard: SequenceShard
    ) -> None:
        self.documents, self.samples, self.shard = documents, samples, shard
        self.capacity, self.pad_token_id = capacity, pad_token_id

    def __getitem__(self, rows: Rows) -> MicroBatch:
        """Return ``[batch, seq]`` tensors for ``rows``, each the indices of its samples; a row may be empty."""
        pieces = self.samples
        documents = [
            [self.documents.part(*map(int, (pieces.document[at], pieces.start[at], pieces.length[at]))) for at in row]
            for row in rows
        ]
        return pack_rows(documents, self.capacity, self.pad_token_id).split(self.shard)


def pack_rows(rows: Sequence[Sequence[Tokens]], capacity: int, pad_token_id: int) -> MicroBatch:
    """Return ``[batch, seq]`` tensors for rows of documents of at most ``capacity`` tokens; a row may be empty."""
    shape = (len(rows), capacity)
    ids, labels = np.full(shape, pad_token_id, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
    positions, weights = np.empty(shape, np.int64), np.ones(shape, np.float32)
    segments: list[int] = []
    lengths: list[int] = []
    filled: list[int] = []
    for row, documents in enumerate(rows):
        at = 0
        for tokens in documents:
            taken = slice(at, at + len(tokens))
            ids[row, taken] = labels[row, taken] = tokens.ids
            if tokens.weights is not None:
                labels[row, taken][tokens.weights == 0] = IGNORE_INDEX
                weights[row, taken] = tokens.weights
            labels[row, at] = IGNORE_INDEX  # it would be predicted from the document before
            positions[row, taken] = np.arange(len(tokens))
            lengths.append(len(tokens))
            segments.append(len(tokens))
            at += len(tokens)
        filled.append(at)
        if at < capacity:
            segments.append(capacity - at)
            positions[row, at:] = np.arange(capacity - at)
    tensors: dict[str, NDArray[Any]] = {"input_ids": ids, "labels": labels, "position_ids": positions}
    if (weights[labels != IGNORE_INDEX] != 1).any():
        tensors["loss_weights"] = weights
    fields: dict[str, Any] = {name: torch.from_numpy(array) for name, array in tensors.items()}
    if len(segments) != len(rows):  # otherwise nothing is to be kept apart: attention may take a dense kernel
        fields |= segment_offsets(segments, capacity)
    return MicroBatch.of_fields(fields, RowLayout(tuple(lengths), tuple(filled)))


def segment_offsets(segments: list[int], capacity: int) -> dict[str, Any]:
    """Return what variable-length attention takes, as transformers names it.

    Both the number of offsets and the longest length are rounded up, so that kernels and graphs are compiled for few of
    them: the last offset is repeated (segments of no tokens), and the length becomes a power of two, or the row's.
    """
    entries = -(-(len(segments) + 1) // _SEGMENT_BUCKET) * _SEGMENT_BUCKET
    offsets = torch.full((entries,), sum(segments), dtype=torch.int32)
    offsets[: len(segments) + 1] = torch.from_numpy(np.concatenate([[0], np.cumsum(segments)]))
    longest = min(capacity, 1 << (max(segments) - 1).bit_length())
    return {
        "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets.clone(), "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip
