"""Losses on the logits of routers, as gradients.

Both are means over all tokens of an optimizer step and over the routers of the model:

- load balancing (Switch, arXiv:2101.03961, equation 4; over the global batch: arXiv:2501.11873),
  ``E * sum_e f_e * P_e``, with ``f_e`` the tokens sent to expert ``e`` divided by all tokens (they add up to
  ``top_k``), and ``P_e`` the mean probability of expert ``e``: transformers' ``load_balancing_loss_func`` for one layer
  at a time. It is ``top_k`` where experts share tokens and probability equally.
- z-loss (ST-MoE, arXiv:2202.08906, equation 5), ``logsumexp(logits)^2``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from veomni.moe.scoring import ScoreFunction, probabilities, scores_and_slope, wide

LogitGradient = Callable[[Tensor], Tensor]


def balance_gradient(logits: Tensor, fractions: Tensor, function: ScoreFunction) -> Tensor:
    """Return the gradient of ``E * sum_te f_e * p_te`` with respect to the logits, ``[tokens, experts]``."""
    # Written out: a backward inside a backward would cost its own pass of the autograd engine in every layer.
    shares = probabilities(function, logits)
    upstream = fractions - (shares @ fractions)[:, None]
    if function == "softmax":
        return len(fractions) * shares * upstream
    scores, slope = scores_and_slope(function, logits)
    return len(fractions) * upstream / scores.sum(dim=-1, keepdim=True) * slope


def z_gradient(logits: Tensor) -> Tensor:
    """Return the gradient of ``sum_t logsumexp(logits_t)^2`` with respect to the logits."""
    return 2 * logits.logsumexp(dim=-1, keepdim=True) * logits.softmax(dim=-1)


class _WithGradient(torch.autograd.Function):
    """The identity on a router's weights, which gives its logits a further gradient in the backward.

    Logits themselves do not reach the model's loss: nothing uses them after the experts were chosen.
    """

    @staticmethod
    def forward(context: Any, weights: Tensor, logits: Tensor, gradient: LogitGradient) -> Tensor:
        context.save_for_backward(logits)
        context.gradient = gradient
        return weights.view_as(weights)

    @staticmethod
    def backward(context: Any, grad_weights: Tensor) -> tuple[Tensor, Tensor, None]:
        (logits,) = context.saved_tensors
        return grad_weights, context.gradient(wide(logits)).to(logits.dtype), None


def with_gradient(weights: Tensor, logits: Tensor, gradient: LogitGradient) -> Tensor:
    """Return ``weights``; their backward adds ``gradient(logits)`` to the gradient of ``logits``.

    It counts once however often the forward is recomputed: the backward is that of the first forward.

    Args:
        weights: ``[tokens, top_k]``.
        logits: ``[tokens, experts]``.
        gradient: Called in the backward, with the logits in float32 or better.
    """
    result: Tensor = _WithGradient.apply(weights, logits, gradient)
    return result
