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
        chosen = _FUNCTIONS[self.function](logits).gather(-1, indices)
        if self.normalized:
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        return chosen * self.scale


def probabilities(function: ScoreFunction, logits: Tensor) -> Tensor:
    """Return each token's distribution over the experts, ``[tokens, experts]``; a load-balancing loss averages it.

    Scores of softmax are one; others are divided by their sum, as in arXiv:2412.19437, equation 19.
    """
    scores = _FUNCTIONS[function](logits)
    return scores if function == "softmax" else scores / scores.sum(dim=-1, keepdim=True)


def scores_and_slope(function: ScoreFunction, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of an elementwise function, and its derivative; both ``[tokens, experts]``."""
    scores = _FUNCTIONS[function](logits)
    if function == "sigmoid":
        return scores, scores * (1 - scores)
    if function == "sqrtsoftplus":
        return scores, logits.sigmoid() / (2 * scores)
    return scores, torch.ones_like(scores)


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
