"""How a router turns logits into the weights of the experts it chose, found out by watching it.

transformers' routers differ in three things only: the function that makes scores of logits, whether the chosen scores
are divided by their sum, and a constant factor. A copy of the router with random weights is run once on random hidden
states; the one formula that gives the very weights it returned is the router's. No table of models to keep, and a
router that computes something else is known to be one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ScoreFunction = Literal["softmax", "sigmoid", "sqrtsoftplus", "identity"]

_FUNCTIONS: dict[ScoreFunction, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
    "identity": lambda probabilities: probabilities,
}
_TOLERANCE = 1e-4  # relative; the copy computes in float32


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or better."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class Scoring:
    """The weight of an expert that a token was sent to.

    Attributes:
        function: Makes scores of logits; "identity" where what the router gives out as logits are scores already.
        normalized: Whether the chosen scores are divided by their sum.
        scale: What they are multiplied with then.
    """

    function: ScoreFunction
    normalized: bool
    scale: float

    def weights(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Return the weights of the experts ``indices``, ``[tokens, top_k]``, for logits ``[tokens, experts]``."""
        chosen = scores_of(self.function, logits).gather(-1, indices)
        if self.normalized:
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        return chosen * self.scale

    def logit_gradient(self, logits: Tensor, indices: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient of the logits from that of :meth:`weights`, ``[tokens, top_k]``."""
        gradient = gradient * self.scale
        if self.normalized:
            gradient = through_shares(scores_of(self.function, logits).gather(-1, indices), gradient)
        return through_scores(self.function, logits, torch.zeros_like(logits).scatter(-1, indices, gradient))


def scores_of(function: ScoreFunction, logits: Tensor) -> Tensor:
    """Return the scores of all experts, ``[tokens, experts]``."""
    return _FUNCTIONS[function](logits)


def probabilities(function: ScoreFunction, logits: Tensor) -> Tensor:
    """Return each token's distribution over the experts, ``[tokens, experts]``; a load-balancing loss averages it.

    Scores of softmax are one; others are divided by their sum, as in arXiv:2412.19437, equation 19.
    """
    scores = scores_of(function, logits)
    return scores if function == "softmax" else scores / scores.sum(dim=-1, keepdim=True)


def through_scores(function: ScoreFunction, logits: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of the logits from that of their scores; all ``[tokens, experts]``."""
    # Written out, and not differentiated by autograd: it runs inside a backward.
    scores = scores_of(function, logits)
    if function == "softmax":
        return scores * (gradient - (scores * gradient).sum(dim=-1, keepdim=True))
    if function == "sigmoid":
        return gradient * scores * (1 - scores)
    if function == "sqrtsoftplus":
        return gradient * logits.sigmoid() / (2 * scores)
    return gradient


def through_shares(scores: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of ``scores`` from that of ``scores / scores.sum(-1)``."""
    total = scores.sum(dim=-1, keepdim=True)
    return (gradient - (gradient * scores).sum(dim=-1, keepdim=True) / total) / total


def find_scoring(logits: Tensor, weights: Tensor, indices: Tensor, scales: Iterable[float] = ()) -> Scoring | None:
    """Return the formula that gives ``weights`` from ``logits``, or None where none does.

    Args:
        logits: ``[tokens, experts]``.
        weights: ``[tokens, top_k]``.
        indices: ``[tokens, top_k]``.
        scales: The constant factors it may have besides 1.
    """
    functions: list[ScoreFunction] = ["softmax", "sigmoid", "sqrtsoftplus"]
    if bool((logits >= 0).all()) and torch.allclose(logits.sum(-1), torch.ones(()), rtol=_TOLERANCE):
        functions = ["identity"]
    for function in functions:
        for normalized in (True, False):
            for scale in (1.0, *scales):
                scoring = Scoring(function, normalized, scale)
                if torch.allclose(weights, scoring.weights(logits, indices), rtol=_TOLERANCE, atol=0):
                    return scoring
    return None
