"""How many answers are right to the last token, each document counted once.

Importing this module imports torchmetrics, which takes seconds: ``veomni.metrics`` does so when the class is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class AnswerAccuracy(Metric):
    """Share of documents all of whose learned tokens are the likeliest ones, given those before.

    That is the share of answers that greedy generation would give word for word: up to the first token that differs,
    the model sees the same tokens either way.

    Args:
        groups: Documents are counted in so many groups, such as the sources they come from.
        options: What every ``torchmetrics.Metric`` takes, such as ``process_group``.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    right: Tensor
    total: Tensor

    def __init__(self, groups: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("right", torch.zeros(groups, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(groups, dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, wrong: Tensor, learned: Tensor, group: Tensor | None = None) -> None:
        """Add documents.

        Args:
            wrong: Of each document, how many of its learned tokens are not the likeliest; int64 ``[documents]``.
            learned: How many learned tokens it has; a document without any is not counted; int64 ``[documents]``.
            group: Which group it belongs to, int64 ``[documents]``; None for the first.
        """
        group = torch.zeros_like(wrong) if group is None else group
        counted = learned > 0
        self.right = self.right.index_add(0, group, (counted & (wrong == 0)).to(self.right.dtype))
        self.total = self.total.index_add(0, group, counted.to(self.total.dtype))

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return ``{"accuracy": overall 0-d, "by_group": [groups]}``, float64; NaN where there is no document."""
        return {"accuracy": self.right.sum() / self.total.sum().double(), "by_group": self.right / self.total.double()}
