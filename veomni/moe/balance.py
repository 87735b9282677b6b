"""Losses on the logits of routers, as gradients.

Both are means over all tokens of an optimizer step and over the routers of the model:

- load balancing (Switch, arXiv:2101.03961, equation 4; over the global batch: arXiv:2501.11873),
  ``E * sum_e f_e * P_e``, with ``f_e`` the tokens sent to expert ``e`` divided by all tokens (they add up to
  ``top_k``), and ``P_e`` the mean probability of expert ``e``: transformers' ``load_balancing_loss_func`` for one layer
  at a time. It is ``top_k`` where experts share tokens and probability equally.
- z-loss (ST-MoE, arXiv:2202.08906, equation 5), ``logsumexp(logits)^2``.
"""

from __future__ import annotations

from torch import Tensor

from veomni.moe.scoring import ScoreFunction, scores_of, through_scores, through_shares


def balance_gradient(function: ScoreFunction, logits: Tensor, fractions: Tensor) -> Tensor:
    """Return the gradient of ``E * sum_te f_e * p_te`` with respect to the logits, ``[tokens, experts]``.

    Args:
        function: What makes scores of logits.
        logits: ``[tokens, experts]``.
        fractions: ``[experts]``, the share of all tokens that were sent to each expert.
    """
    gradient = (len(fractions) * fractions).expand_as(logits)
    if function != "softmax":
        gradient = through_shares(scores_of(function, logits), gradient)
    return through_scores(function, logits, gradient)


def z_gradient(logits: Tensor) -> Tensor:
    """Return the gradient of ``sum_t logsumexp(logits_t)^2`` with respect to the logits."""
    return 2 * logits.logsumexp(dim=-1, keepdim=True) * logits.softmax(dim=-1)
