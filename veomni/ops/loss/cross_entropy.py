"""Cross-entropy fused with the projection to the vocabulary: the logits of all tokens never exist at once.

The forward computes gradients chunk by chunk, as Liger Kernel's does (arXiv:2410.10989); the backward only scales them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veomni.batch.fields import IGNORE_INDEX
from veomni.parallel.wrappers import wide_dtype

CHUNK_ELEMENTS = 1 << 29
"""Logits held at once: 2^29 elements are 1 GiB in bf16, which fills a matrix unit and is small beside activations."""


def cross_entropy_sum(
    logits: Tensor, labels: Tensor, losses: Tensor | None = None, token_weights: Tensor | None = None,
    predictions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the summed cross-entropy of materialised logits ``[tokens, vocab]``, in float32 or better.

    ``labels``, int64 ``[tokens]``, take no part where they are ``IGNORE_INDEX``. ``losses`` ``[tokens]`` is where the
    loss of each token is written, zero without a label, and ``predictions``, int64 ``[tokens]``, where its likeliest
    token is. ``token_weights`` ``[tokens]``, of the result's dtype, multiply losses in the sum, not in ``losses``.
    """
    if predictions is not None:
        torch.argmax(logits.detach(), dim=-1, out=predictions)
    each = F.cross_entropy(
        logits.to(wide_dtype(logits.dtype)), labels, ignore_index=IGNORE_INDEX,
        reduction="sum" if losses is None and token_weights is None else "none",
    )  # fmt: skip
    if losses is not None:
        losses.copy_(each.detach())
    return (each if token_weights is None else each * token_weights).sum()


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, losses: Tensor | None = None,
    token_weights: Tensor | None = None, predictions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the summed cross-entropy of ``hidden @ weight.T + bias`` without keeping the logits.

    ``hidden`` is ``[tokens, hidden]``, ``weight`` ``[vocab, hidden]`` and ``bias`` ``[vocab]``; the other arguments are
    those of :func:`cross_entropy_sum`. The result is 0-d, float64 for float64 inputs and float32 otherwise.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device_type, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, bias, losses, token_weights, predictions)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, losses: Tensor | None,
        token_weights: Tensor | None, predictions: Tensor | None,
    ) -> Tensor:  # fmt: skip
        wide = wide_dtype(hidden.dtype)
        needs_hidden, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias and bias is not None else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = F.linear(hidden[chunk], weight, bias)
            if predictions is not None:
                torch.argmax(logits, dim=-1, out=predictions[chunk])
            scale = None if token_weights is None else token_weights[chunk]
            each = _losses_and_gradient_(logits, labels[chunk], scale, with_gradient=any(ctx.needs_input_grad))
            loss += (each if scale is None else each * scale).sum()
            if losses is not None:
                losses[chunk] = each
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_product_(grad_weight, logits.t(), hidden[chunk])
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=wide)
        ctx.gradients, ctx.dtype = (grad_hidden, grad_weight, None, grad_bias), hidden.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused loss scales its gradients in place: call backward on it once")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if gradient is None else gradient.mul_(grad_loss).to(ctx.dtype) for gradient in gradients]
        return *scaled, None, None, None


def _losses_and_gradient_(logits: Tensor, labels: Tensor, scale: Tensor | None, *, with_gradient: bool) -> Tensor:
    """Return each token's loss, zero without a label; ``logits`` become its gradient, which ``scale`` multiplies."""
    if logits.is_cuda and logits.dtype is not torch.float64:  # the kernel adds up in float32
        from veomni.ops.loss.cross_entropy_triton import losses_and_gradient_

        return losses_and_gradient_(logits, labels, scale, with_gradient=with_gradient)
    wide = logits.to(wide_dtype(logits.dtype))
    kept = labels != IGNORE_INDEX
    target = labels.where(kept, 0).unsqueeze(1)
    log_sum = wide.logsumexp(1, keepdim=True)
    losses = (log_sum - wide.gather(1, target)).squeeze(1)
    if with_gradient:
        gradient = (wide - log_sum).exp_()
        gradient.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
        if scale is not None:
            gradient.mul_(scale.unsqueeze(1))
        logits.copy_(gradient.mul_(kept.unsqueeze(1)))
    return losses.mul(kept)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total``, which may be wider than the factors."""
    if total.dtype is left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(left, right)
