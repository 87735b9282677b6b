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
    """Mean negative log-likelihood per token, in nats, and its exponential.

    Sums are kept in float64 and added over ranks when the result is computed, so that ranks with more tokens weigh
    more and a rank with none weighs nothing.

    Args:
        options: What every ``torchmetrics.Metric`` takes, such as ``process_group``.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    nll_sum: Tensor
    tokens: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("nll_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, nll_sum: Tensor | float, tokens: Tensor | int) -> None:
        """Add a batch of this rank.

        Args:
            nll_sum: Negative log-likelihoods of its tokens, summed; 0-d. Not read when there are no tokens: the mean
                that it was computed from may be NaN then.
            tokens: How many tokens that were.
        """
        count = torch.as_tensor(tokens, dtype=torch.int64, device=self.tokens.device)
        nll = torch.as_tensor(nll_sum, device=self.tokens.device).detach().to(torch.float64)
        self.nll_sum = self.nll_sum + torch.where(count > 0, nll, 0.0)
        self.tokens = self.tokens + count

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return ``{"loss": mean, "perplexity": exp(mean)}``, float64 0-d; NaN when there were no tokens at all."""
        mean = self.nll_sum / self.tokens
        return {"loss": mean, "perplexity": mean.exp()}
