"""The experts that a true step chose, for a step on a layout: rounding would send some tokens to others."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veomni.moe import RoutingLog
from veomni.testing.documents import ROW, Document

Choices = Mapping[str, Tensor]
"""Experts ``[tokens, top_k]`` of a document, by the name of the router."""


def packed_routing(
    rows: list[list[Document]], choices: Sequence[Choices], rank: int, size: int, accumulation: int
) -> RoutingLog:
    """Return what data rank ``rank`` of ``size`` replays; ``choices`` are of each document, in the order of ``rows``.

    It belongs to the micro-batches of :func:`veomni.testing.documents.share`. Padding goes to the first experts.
    """
    each = iter(choices)
    mine = [[next(each) for _ in documents] for documents in rows][rank::size]
    count = len(mine) // accumulation
    return RoutingLog([_joined(mine[start : start + count]) for start in range(0, len(mine), count)])


def _joined(rows: Sequence[Sequence[Choices]]) -> dict[str, Tensor]:
    return {name: torch.cat([_padded([one[name] for one in row]) for row in rows]) for name in rows[0][0]}


def _padded(parts: Sequence[Tensor]) -> Tensor:
    tokens, top_k = sum(len(part) for part in parts), parts[0].shape[1]
    return torch.cat([*parts, torch.arange(top_k, dtype=parts[0].dtype).expand(ROW - tokens, top_k)])
