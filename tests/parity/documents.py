"""A fixed global batch, packed by hand: odd lengths, padded tails, and rows in which nothing is learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORE = -100
ROW = 40
ROWS = 12


@dataclass
class Document:
    tokens: torch.Tensor  # [length]
    labels: torch.Tensor  # [length], IGNORE where nothing is learned


def global_rows(vocab: int, rows: int = ROWS) -> list[list[Document]]:
    """Rows of documents: row 3 has no label at all, row 5 is one document that fills it, row 7 ends in one token."""
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
    return sum(int((document.labels[1:] != IGNORE).sum()) for document in documents)


def pack(rows: list[list[Document]]) -> dict[str, object]:
    """One micro-batch ``[len(rows), ROW]`` as the loader's contract in veomni/batch/micro_batch.py has it."""
    keys: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "position_ids": []}
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
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch: dict[str, object] = {name: torch.stack(parts) for name, parts in keys.items()}
    return {**batch, "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": ROW, "max_length_k": ROW}


def share(rows: list[list[Document]], rank: int, size: int, accumulation: int) -> list[dict[str, object]]:
    """The micro-batches of data rank ``rank``: it takes every ``size``-th row."""
    mine = rows[rank::size]
    per_micro = len(mine) // accumulation
    return [pack(mine[start : start + per_micro]) for start in range(0, len(mine), per_micro)]
