"""Attention of some queries over some of the keys, in a form whose parts can be put together.

Shapes are ``[batch, heads, seq, head_dim]``, and ``kv_heads`` divides ``heads``. Beside its output a part returns the
logarithm of the sum of the exponentials of its scores (``lse``); with it, outputs over different keys add up to the
output over all of them. The gradient of a part needs only the output and the lse over all keys, as in FlashAttention
(Dao et al., 2022, arXiv:2205.14135).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from veomni.compat import attention_kernels as kernels

Kernel = Literal["math", "flash", "efficient"]

_LARGEST_FLASH_HEAD = 256
_WIDTH_MULTIPLE = 8
_BIAS_MULTIPLE = 16
_LSE_MULTIPLE = 32
# Finite, as a kernel may return NaN for a row of infinities; exp of it is zero, and float16 holds it.
_HIDDEN = -3e4


def select_kernel(device_type: str, dtype: torch.dtype, head_dim: int, value_head_dim: int, *, masked: bool) -> Kernel:
    """Return what computes a part.

    Args:
        device_type: Where the tensors are.
        dtype: What queries, keys and values are in.
        head_dim: Of queries and keys.
        value_head_dim: Of values.
        masked: Whether there is a boolean mask; causality is none.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    aligned = head_dim % _WIDTH_MULTIPLE == 0 and value_head_dim % _WIDTH_MULTIPLE == 0
    if device_type != "cuda" or not aligned or not (half or dtype is torch.float32):
        return "math"
    if half and not masked and head_dim == value_head_dim <= _LARGEST_FLASH_HEAD:
        return "flash"
    return "efficient"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what sums over parts are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend over a part of the keys.

    Args:
        query: ``[batch, heads, q, head_dim]``.
        key: ``[batch, kv_heads, kv, head_dim]``.
        value: ``[batch, kv_heads, kv, value_head_dim]``.
        mask: True where a query sees a key, ``[batch, 1, q, kv]``; None for everywhere.
        causal: Let query ``i`` see keys up to ``i`` only; ``q`` equals ``kv`` then, and there is no mask.
        scale: Factor on the scores.

    Returns:
        The output, ``[batch, heads, q, value_head_dim]`` in the format of ``query`` or finer, and the lse,
        ``[batch, heads, q]`` in the format of accumulation; zero and minus infinity for a query that sees nothing.
    """
    kernel = select_kernel(query.device.type, query.dtype, query.shape[-1], value.shape[-1], masked=mask is not None)
    if kernel == "flash":
        return kernels.flash(query, key, value, causal=causal, scale=scale)
    if kernel == "efficient":
        return _efficient(query, key, value, mask, causal, scale)
    return _math(query, key, value, mask, causal, scale)


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a part of the keys adds to the gradients of queries, and the gradients of its keys and values.

    Args:
        grad: Gradient of the output over all keys, ``[batch, heads, q, value_head_dim]``.
        query: As for :func:`attend`; so are ``key``, ``value``, ``mask``, ``causal`` and ``scale``.
        key: The part's keys.
        value: The part's values.
        output: The output over all keys, in the format of ``query``.
        lse: The lse over all keys, ``[batch, heads, q]``; minus infinity for a query that sees nothing at all.
        mask: The part's mask.
        causal: Whether the part is causal.
        scale: Factor on the scores.
    """
    kernel = select_kernel(query.device.type, query.dtype, query.shape[-1], value.shape[-1], masked=mask is not None)
    if kernel == "flash":
        return kernels.flash_backward(grad, query, key, value, output, lse, causal=causal, scale=scale)
    if kernel == "efficient":
        return _efficient_backward(grad, query, key, value, output, lse, mask, causal, scale)
    return _math_backward(grad, query, key, value, output, lse, mask, causal, scale)


def merge_into(total: Tensor, total_lse: Tensor, output: Tensor, lse: Tensor) -> None:
    """Add a part to the sum of others, in place.

    Args:
        total: ``[batch, heads, q, value_head_dim]`` in the format of accumulation; zero before the first part.
        total_lse: ``[batch, heads, q]``; minus infinity before the first part.
        output: The part's output.
        lse: The part's lse.
    """
    together = torch.logaddexp(total_lse, lse)
    origin = _finite(together, 0.0)
    total.mul_((total_lse - origin).exp_().unsqueeze(-1))
    total.add_(output * (lse - origin).exp_().unsqueeze(-1))
    total_lse.copy_(together)


def _finite(lse: Tensor, instead: float) -> Tensor:
    """Replace the lse of queries that see nothing, whose difference to itself is not a number."""
    return lse.masked_fill(lse == -torch.inf, instead)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Return ``[batch, kv_heads, heads / kv_heads * q, kv]``, minus infinity where hidden."""
    scores = _by_key_head(query, key) @ key.mT * scale
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None:
        scores.unflatten(2, (-1, query.shape[2])).masked_fill_(~mask.unsqueeze(1), -torch.inf)
    return scores


def _by_key_head(per_head: Tensor, key: Tensor) -> Tensor:
    """Lay the heads that share a key head one after the other along the rows, so that no key is repeated."""
    return per_head.unflatten(1, (key.shape[1], -1)).flatten(2, 3)


def _math(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(query.dtype)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scores = _scores(query, key, mask, causal, scale)
    lse = scores.logsumexp(-1)
    output = (scores - _finite(lse, 0.0).unsqueeze(-1)).exp_() @ value
    shape = query.shape[:3]
    return output.reshape(*shape, -1), lse.reshape(shape)


def _math_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(query.dtype)
    grad, query, key, value, output = (tensor.to(dtype) for tensor in (grad, query, key, value, output))
    scores = _scores(query, key, mask, causal, scale)
    weights = (scores - _by_key_head(_finite(lse, 0.0).unsqueeze(-1), key)).exp_()
    common = _by_key_head((grad * output).sum(-1, keepdim=True), key)
    rows = _by_key_head(grad, key)
    grad_scores = (rows @ value.mT).sub_(common).mul_(weights).mul_(scale)
    grad_query = (grad_scores @ key).reshape(query.shape)
    return grad_query, grad_scores.mT @ _by_key_head(query, key), weights.mT @ rows


def _bias(mask: Tensor, query: Tensor) -> Tensor:
    """Return what the kernel adds to the scores, ``[batch, heads, q, kv]``, its rows aligned in memory."""
    width = mask.shape[-1]
    room = query.new_zeros(*mask.shape[:-1], width + -width % _BIAS_MULTIPLE)[..., :width]
    return room.masked_fill_(~mask, _HIDDEN).expand(-1, query.shape[1], -1, -1)


def _repeated(tensor: Tensor, query: Tensor) -> Tensor:
    repeats = query.shape[1] // tensor.shape[1]
    return tensor.repeat_interleave(repeats, dim=1) if repeats > 1 else tensor


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    bias = None if mask is None else _bias(mask, query)
    key, value = _repeated(key, query), _repeated(value, query)
    output, lse = kernels.efficient(query, key, value, bias, causal=causal, scale=scale)
    lse = lse[..., : query.shape[2]]
    if mask is None:
        return output, lse
    blind = ~mask.any(-1)
    return output.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf)


def _efficient_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    bias = None if mask is None else _bias(mask, query)
    # Weights are exp(score - lse): an infinite lse makes those of the padding and of blind queries zero.
    aligned = torch.nn.functional.pad(_finite(lse, torch.inf), (0, -lse.shape[-1] % _LSE_MULTIPLE), value=torch.inf)
    # In half precision the kernel reads the output as [batch, q, heads, head_dim] in memory, whatever its strides say.
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    inputs = query, _repeated(key, query), _repeated(value, query)
    grad_query, grad_key, grad_value = kernels.efficient_backward(
        grad, inputs, bias, output, aligned, causal=causal, scale=scale
    )
    return grad_query, _summed(grad_key, key), _summed(grad_value, value)


def _summed(grad: Tensor, like: Tensor) -> Tensor:
    """Add the gradients of the heads that share a key head."""
    if grad.shape[1] == like.shape[1]:
        return grad
    return grad.unflatten(1, (like.shape[1], -1)).sum(2, dtype=accumulation_dtype(grad.dtype))


__all__ = ["Kernel", "accumulation_dtype", "attend", "attend_backward", "merge_into", "select_kernel"]
