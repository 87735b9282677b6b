"""Means over held-out data. Importing this module imports torchmetrics, which takes seconds."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class WeightedMean(Metric):
    """Weighted mean of numbers, of all and of each of ``groups``, over updates and ranks; sums are float64."""

    full_state_update = False
    is_differentiable = False
    sums: Tensor

    def __init__(self, groups: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("sums", torch.zeros(2, groups, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, values: Tensor | float, weights: Tensor | float, groups: Tensor | None = None) -> None:
        """Add ``[n]`` numbers or one, each of a group, int64 ``[n]`` (None: the first); NaN at weight 0 is left out."""
        given = (torch.as_tensor(each, dtype=torch.float64, device=self.sums.device) for each in (values, weights))
        number, weight = (each.detach().reshape(-1) for each in given)
        groups = torch.zeros_like(weight, dtype=torch.int64) if groups is None else groups
        added = torch.stack([torch.where(weight > 0, number * weight, 0.0), weight])
        self.sums = self.sums.index_add(1, groups, added)

    @override
    def compute(self) -> Tensor:
        """Return the mean of all, then of each group, float64 ``[1 + groups]``; NaN where nothing weighs."""
        totals, weights = torch.cat([self.sums.sum(1, keepdim=True), self.sums], dim=1)
        return totals / weights
