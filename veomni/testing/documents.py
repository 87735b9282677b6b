"""A fixed global batch, packed by hand: odd lengths, padded tails, and rows in which nothing is supervised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veomni.batch.fields import IGNORE_INDEX

IGNORE = IGNORE_INDEX
ROW = 40
ROWS = 12


@dataclass
class Document:
    """One document.

    Attributes:
        tokens: int64 ``[length]``.
        labels: int64 ``[length]``, unshifted; ``IGNORE`` where no loss is taken.
    """

    tokens: Tensor
    labels: Tensor


def global_rows(vocab: int, rows: int = ROWS) -> list[list[Document]]:
    """Return rows of documents, the same for every layout.

    Row 3 has no label at all, row 5 is one document that fills it, row 7 ends in one token.

    Args:
        vocab: Number of tokens that are drawn from.
        rows: Number of rows; a multiple of data ranks times micro-batches.
    """
    generator = torch.Generator().manual_seed(11)
    shapes = [(7, 13, 17), (5, 31), (3, 2, 29), (11, 20), (19, 8, 6), (ROW,), (1, 9, 25), (21, 17, 1)]
    packed = []
    for row in range(rows):
        documents = []
        for length in shapes[row % len(shapes)]:
            tokens = torch.randint(1, vocab, (length,), generator=generator)
            labels = tokens.clone()
            labels[torch.rand(length, generator=generator) < 0.2 * (row % 3)] = IGNORE
            if row == 3:
                labels[:] = IGNORE
            documents.append(Document(tokens, labels))
        packed.append(documents)
    return packed


def supervised(documents: list[Document]) -> int:
    """Return how many tokens of documents a loss is taken on: all labels but each document's first."""
    return sum(int((document.labels[1:] != IGNORE).sum()) for document in documents)


def pack(rows: list[list[Document]]) -> dict[str, Any]:
    """Return one micro-batch ``[len(rows), ROW]`` as ``veomni/batch/micro_batch.py`` describes it."""
    keys: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "position_ids": []}
    lengths: list[int] = []
    for documents in rows:
        tail = ROW - sum(len(document.tokens) for document in documents)
        tokens = [document.tokens for document in documents] + [torch.zeros(tail, dtype=torch.int64)]
        labels = [document.labels.clone() for document in documents] + [torch.full((tail,), IGNORE)]
        for label in labels[1:]:
            label[:1] = IGNORE
        keys["input_ids"].append(torch.cat(tokens))
        keys["labels"].append(torch.cat(labels))
        keys["position_ids"].append(torch.cat([torch.arange(len(part)) for part in tokens]))
        lengths += [len(part) for part in tokens if len(part)]
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch: dict[str, Any] = {name: torch.stack(parts) for name, parts in keys.items()}
    return {**batch, "cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": ROW, "max_length_k": ROW}


def share(rows: list[list[Document]], rank: int, size: int, accumulation: int) -> list[dict[str, Any]]:
    """Return the micro-batches of data rank ``rank`` of ``size``: it takes every ``size``-th row."""
    mine = rows[rank::size]
    per_micro = len(mine) // accumulation
    return [pack(mine[start : start + per_micro]) for start in range(0, len(mine), per_micro)]
