"""Softmax cross-entropy over rows of logits on a GPU: one kernel gives the loss and writes the gradient in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veomni.batch.fields import IGNORE_INDEX

_BLOCK = 8192


@triton.jit
def _cross_entropy_kernel(
    logits, labels, losses, scales, vocab, stride, IGNORED: tl.constexpr, WITH_GRADIENT: tl.constexpr,
    SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    offsets = tl.arange(0, BLOCK)
    if label == IGNORED:
        tl.store(losses + row, 0.0)
        if WITH_GRADIENT:
            for start in range(0, vocab, BLOCK):
                zero = tl.zeros((BLOCK,), dtype=tl.float32).to(logits.dtype.element_ty)
                tl.store(logits + start + offsets, zero, mask=start + offsets < vocab)
        return
    maximum = float("-inf")
    total = 0.0
    for start in range(0, vocab, BLOCK):
        inside = start + offsets < vocab
        values = tl.load(logits + start + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        new_maximum = tl.maximum(maximum, tl.max(values, 0))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(values - new_maximum), 0)
        maximum = new_maximum
    log_sum = maximum + tl.log(total)
    target = tl.load(logits + label).to(tl.float32)
    tl.store(losses + row, log_sum - target)
    if WITH_GRADIENT:
        tl.debug_barrier()  # every thread has read its target before any thread overwrites it
        for start in range(0, vocab, BLOCK):
            inside = start + offsets < vocab
            values = tl.load(logits + start + offsets, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(values - log_sum)
            gradient = tl.where(start + offsets == label, gradient - 1.0, gradient)
            if SCALED:
                gradient *= tl.load(scales + row)
            tl.store(logits + start + offsets, gradient.to(logits.dtype.element_ty), mask=inside)


def losses_and_gradient_(logits: Tensor, labels: Tensor, scale: Tensor | None = None, *, with_gradient: bool) -> Tensor:
    """Return each token's loss, float32 ``[tokens]``, zero without a label; overwrite ``logits`` with its gradient.

    Rows of ``logits`` ``[tokens, vocab]`` are contiguous, in bf16, fp16 or fp32. ``scale``, float32 ``[tokens]``, is
    what the gradient, not the loss, is multiplied by; None is one.
    """
    tokens, vocab = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    scales = losses if scale is None else scale.contiguous()  # a pointer is needed, and not read
    _cross_entropy_kernel[(tokens,)](
        logits, labels, losses, scales, vocab, logits.stride(0), IGNORED=IGNORE_INDEX, WITH_GRADIENT=with_gradient,
        SCALED=scale is not None, BLOCK=_BLOCK, num_warps=16,
    )  # fmt: skip
    return losses
