"""A fixed global batch, packed by hand: odd lengths, padded tails, and rows in which nothing is supervised."""

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
    """One document ``[length]``: labels are unshifted, ``IGNORE`` where no loss is taken; weights of None are all 1."""

    tokens: Tensor
    labels: Tensor
    weights: Tensor | None = None


def global_rows(vocab: int, rows: int = ROWS, *, weighted: bool = False) -> list[list[Document]]:
    """Return rows of documents, the same for every layout: a multiple of data ranks times micro-batches.

    Row 3 has no label at all, row 5 is one document that fills it, row 7 ends in one token. Weighted ones have small
    weights in all rows but the first two, alternating 0 and 1 in row 4.
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
    for row, documents in enumerate(packed if weighted else ()):
        for document in documents:
            drawn = torch.rand(len(document.tokens), generator=generator) * (8.0 if row < 2 else 0.5)
            document.weights = torch.arange(len(drawn)).remainder(2).float() if row == 4 else drawn
    return packed


def supervised(documents: list[Document]) -> float:
    """Return how many tokens of documents a loss is taken on, weighted: all labels but each document's first."""
    return sum(float(weights_of(document)[1:].sum()) for document in documents)


def weights_of(document: Document) -> Tensor:
    """Return the weight of every label, 0 where no loss is taken; float64 ``[length]``."""
    weights = torch.ones(len(document.tokens)) if document.weights is None else document.weights
    return torch.where(document.labels == IGNORE, 0.0, weights.double())


def pack(rows: list[list[Document]]) -> dict[str, Any]:
    """Return one micro-batch ``[len(rows), ROW]`` as ``veomni/batch/micro_batch.py`` describes it."""
    keys: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "position_ids": [], "loss_weights": []}
    lengths: list[int] = []
    for documents in rows:
        tail = ROW - sum(len(document.tokens) for document in documents)
        parts = [*documents, Document(torch.zeros(tail, dtype=torch.int64), torch.full((tail,), IGNORE))]
        keys["input_ids"].append(torch.cat([part.tokens for part in parts]))
        labels = [part.labels.clone() for part in parts]
        for label in labels[1:]:
            label[:1] = IGNORE
        keys["labels"].append(torch.cat(labels))
        keys["position_ids"].append(torch.cat([torch.arange(len(part.tokens)) for part in parts]))
        weights = [torch.ones(len(part.tokens)) if part.weights is None else part.weights for part in parts]
        keys["loss_weights"].append(torch.cat(weights))
        lengths += [len(part.tokens) for part in parts if len(part.tokens)]
    if all(document.weights is None for documents in rows for document in documents):
        del keys["loss_weights"]
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch: dict[str, Any] = {name: torch.stack(parts) for name, parts in keys.items()}
    return {**batch, "cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": ROW, "max_length_k": ROW}


def share(rows: list[list[Document]], rank: int, size: int, accumulation: int) -> list[dict[str, Any]]:
    """Return the micro-batches of data rank ``rank`` of ``size``: it takes every ``size``-th row."""
    mine = rows[rank::size]
    per_micro = len(mine) // accumulation
    return [pack(mine[start : start + per_micro]) for start in range(0, len(mine), per_micro)]
