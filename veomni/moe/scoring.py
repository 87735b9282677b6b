"""How a router turns logits into weights of experts: a score, a division by their sum or none, and a factor.

Gradients are written out: they are computed inside a backward.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from veomni.parallel.wrappers import wide_dtype

ScoreFunction = Literal["softmax", "sigmoid", "sqrtsoftplus", "identity"]

_SCORES: dict[ScoreFunction, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
    "identity": lambda probabilities: probabilities,
}
_GRADIENTS: dict[ScoreFunction, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "softmax": lambda logits, scores, grad: scores * (grad - (scores * grad).sum(dim=-1, keepdim=True)),
    "sigmoid": lambda logits, scores, grad: grad * scores * (1 - scores),
    "sqrtsoftplus": lambda logits, scores, grad: grad * logits.sigmoid() / (2 * scores),
    "identity": lambda logits, scores, grad: grad,
}
"""The gradient of the logits from them, their scores and the scores' gradient; all ``[tokens, experts]``."""

_TOLERANCE = 1e-4  # relative; the copy computes in float32


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or better."""
    return tensor.to(wide_dtype(tensor.dtype))


@dataclass(frozen=True)
class Scoring:
    """The weight of an expert that a token was sent to: its score, of a sum of 1 if ``normalized``, times ``scale``.

    ``function`` makes scores of logits; it is "identity" where what the router gives out as logits are scores already.
    """

    function: ScoreFunction
    normalized: bool
    scale: float

    def weights(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Return the weights of the experts ``indices``, ``[tokens, top_k]``, for logits ``[tokens, experts]``."""
        chosen = _SCORES[self.function](logits).gather(-1, indices)
        if self.normalized:
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        return chosen * self.scale

    def logit_gradient(self, logits: Tensor, indices: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient of the logits from that of :meth:`weights`, ``[tokens, top_k]``."""
        scores, gradient = _SCORES[self.function](logits), gradient * self.scale
        if self.normalized:
            gradient = _through_shares(scores.gather(-1, indices), gradient)
        return _GRADIENTS[self.function](logits, scores, torch.zeros_like(logits).scatter(-1, indices, gradient))


def _through_shares(scores: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of ``scores`` from that of ``scores / scores.sum(-1)``."""
    total = scores.sum(dim=-1, keepdim=True)
    return (gradient - (gradient * scores).sum(dim=-1, keepdim=True) / total) / total


def probabilities(function: ScoreFunction, logits: Tensor) -> Tensor:
    """Return each token's distribution over the experts, ``[tokens, experts]``; a load-balancing loss averages it.

    Scores of softmax are one; others are divided by their sum, as in arXiv:2412.19437, equation 19.
    """
    scores = _SCORES[function](logits)
    return scores if function == "softmax" else scores / scores.sum(dim=-1, keepdim=True)


def balance_gradient(function: ScoreFunction, logits: Tensor, relative_load: Tensor) -> Tensor:
    """Return the gradient of ``sum_te (E f_e) p_te`` with respect to the logits, ``[tokens, experts]``.

    The load-balancing loss (Switch, arXiv:2101.03961, equation 4; over the global batch: arXiv:2501.11873) is its mean
    over tokens, and over the routers of the model: transformers' ``load_balancing_loss_func`` for one layer at a time.
    It is ``top_k`` where experts share tokens and probability equally. ``relative_load`` is ``E f_e``, ``[experts]``:
    the share of all tokens that was sent to each expert, times experts.
    """
    gradient, scores = relative_load.expand_as(logits), _SCORES[function](logits)
    if function != "softmax":
        gradient = _through_shares(scores, gradient)
    return _GRADIENTS[function](logits, scores, gradient)


def z_gradient(logits: Tensor) -> Tensor:
    """Return the gradient of ``sum_t logsumexp(logits_t)^2`` (ST-MoE, arXiv:2202.08906, equation 5)."""
    return 2 * logits.logsumexp(dim=-1, keepdim=True) * logits.softmax(dim=-1)


def find_scoring(logits: Tensor, weights: Tensor, indices: Tensor, scales: Iterable[float] = ()) -> Scoring | None:
    """Return the formula, with a factor of 1 or of ``scales``, that gives the chosen experts' weights; None without."""
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
