"""Attention kernels that return more than SDPA does, and the operations that a recomputation keeps the results of.

Called directly: SDPA returns no logarithm of sums of exponentials and prefers FlashAttention 2 where cuDNN is faster,
and a backend context does not reach through a compiled layer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_SAVED = (
    ("aten", "_scaled_dot_product_flash_attention"),
    ("aten", "_scaled_dot_product_efficient_attention"),
    ("aten", "_scaled_dot_product_cudnn_attention"),
    ("aten", "_scaled_dot_product_flash_attention_for_cpu"),
    ("aten", "_scaled_dot_product_fused_attention_overrideable"),
    ("torch_attn", "_varlen_attn"),
    ("veomni", "cudnn_varlen_attention"),
)


def flash(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output and the lse."""
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scale
    )
    return output, lse


def flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    # Nothing is drawn without dropout, but the kernel takes the state of a generator.
    seed, offset = (torch.empty(shape, dtype=torch.uint64, device=query.device) for shape in ((2,), ()))
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, output, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, causal,
        seed, offset, scale=scale,
    )  # fmt: skip
    return grads


def efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and the lse, which may be longer than the queries."""
    output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, causal, scale=scale
    )
    return output, lse


def efficient_backward(
    grad: Tensor, inputs: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, output: Tensor, lse: Tensor,
    *, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of queries, keys and values, which are ``inputs``."""
    unused = torch.empty((), dtype=torch.int64, device=grad.device)
    grad_query, grad_key, grad_value, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad, *inputs, bias, output, lse, unused, unused, 0.0, [True, True, True, False], causal, scale=scale
    )
    return grad_query, grad_key, grad_value


def cudnn(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float | None) -> Tensor:
    """Return the output, ``[batch, heads, seq, head_dim]``."""
    output: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )[0]
    return output


@functools.cache
def attention_operations() -> frozenset[Any]:
    """Return the operations of all attention kernels there are here: a release may lack some."""
    found = (getattr(getattr(torch.ops, namespace), name, None) for namespace, name in _SAVED)
    return frozenset(operation.default for operation in found if operation is not None)
