"""Attention kernels that return more than SDPA does, and the operations that a recomputation keeps the results of.

Called directly: SDPA returns no logarithm of sums of exponentials and prefers FlashAttention 2 where cuDNN is faster,
and a backend context does not reach through a compiled layer.
"""

import functools
from typing import Any

import torch

FLASH = torch.ops.aten._scaled_dot_product_flash_attention
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention
EFFICIENT_BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward
CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention
CUDNN_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
VARLEN = torch.ops.aten._flash_attention_forward
VARLEN_BACKWARD = torch.ops.aten._flash_attention_backward

_SAVED = (
    ("aten", "_scaled_dot_product_flash_attention"),
    ("aten", "_scaled_dot_product_efficient_attention"),
    ("aten", "_scaled_dot_product_cudnn_attention"),
    ("aten", "_scaled_dot_product_flash_attention_for_cpu"),
    ("aten", "_scaled_dot_product_fused_attention_overrideable"),
    ("torch_attn", "_varlen_attn"),
    ("_c10d_functional", "all_to_all_single"),  # of heads, in flight
    ("_c10d_functional", "wait_tensor"),
)


@functools.cache
def attention_operations() -> frozenset[Any]:
    """Return the operations of attention kernels and their exchanges that there are here: a release may lack some."""
    found = (getattr(getattr(torch.ops, namespace), name, None) for namespace, name in _SAVED)
    return frozenset(operation.default for operation in found if operation is not None)
