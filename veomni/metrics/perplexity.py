"""Perplexity over held-out tokens, each counted once, however they are spread over ranks.

Importing this module imports torchmetrics, which takes seconds: ``veomni.metrics`` does so when the class is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class TokenPerplexity(Metric):
    """Mean negative log-likelihood per token, in nats, and its exponential; weighted, where tokens have weights.

    Sums are kept in float64 and added over ranks when the result is computed, so that ranks with more tokens weigh
    more and a rank with none weighs nothing.

    Args:
        options: What every ``torchmetrics.Metric`` takes, such as ``process_group``.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    nll_sum: Tensor
    weight: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("nll_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, nll_sum: Tensor | float, weight: Tensor | float) -> None:
        """Add a batch of this rank.

        Args:
            nll_sum: Negative log-likelihoods of its tokens, each times its weight, summed; 0-d. Not read when there are
                no tokens: the mean that it was computed from may be NaN then.
            weight: Their weighted number.
        """
        added = torch.as_tensor(weight, dtype=torch.float64, device=self.weight.device)
        nll = torch.as_tensor(nll_sum, device=self.weight.device).detach().to(torch.float64)
        self.nll_sum = self.nll_sum + torch.where(added > 0, nll, 0.0)
        self.weight = self.weight + added

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return ``{"loss": mean, "perplexity": exp(mean)}``, float64 0-d; NaN when there were no tokens at all."""
        mean = self.nll_sum / self.weight
        return {"loss": mean, "perplexity": mean.exp()}
