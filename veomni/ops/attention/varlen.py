"""Attention over packed rows on GPUs, in transformers' attention signature.

``varlen`` reads document boundaries from ``cu_seq_lens_q`` and runs PyTorch's variable-length FlashAttention kernel, so
packed documents stay apart without a mask. Rows that are one document each take a dense kernel: FlashAttention 3
or 4 where ``flash_package`` put one in place, else cuDNN's, 1.7 times as fast as FlashAttention 2 on an H200 (2.07
ms against 3.57 ms for 4 x 4096 tokens, 16/8 heads of 128). cuDNN's own variable-length path is not used: on torch 2.11
its backward is wrong and it plans at every call.
"""

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veomni.compat import attention_kernels as kernels
from veomni.errors import ModelError

VARLEN = "varlen"


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend within each document of packed rows; see ``AttentionBackend.function``.

    Boundaries are ``cu_seq_lens_q``, int32 ``[documents + 1]`` over the flattened rows; without them, or with as many
    documents as rows, every row is one document. No document is longer than ``max_length_q``; a token sees
    ``sliding_window`` positions back, itself included. Masks, dropout in training, sinks and soft caps are unsupported.
    """
    _check_options(attention_mask, dropout if module.training else 0.0, kwargs)
    query, key, value = in_autocast_dtype(query, key, value)
    batch, _, length, _ = query.shape
    causal, window = kwargs.get("is_causal"), kwargs.get("sliding_window")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    # Documents do not cross rows. Only the shape is read: values would have to be copied from the device.
    if cu_seq_lens_q is None or max_length_q is None or len(cu_seq_lens_q) == batch + 1:
        kernel = dense_kernel(query, value) if window is None else None
        if kernel is not None:
            return _dense(kernel, query, key, value, causal, scaling).transpose(1, 2), None
        cu_seq_lens_q = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 has no such argument and lets the kernel group the heads; later versions need it.
    grouped = query.shape[1] != key.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if grouped else {}
    query, key, value = (heads.transpose(1, 2).flatten(0, 1) for heads in (query, key, value))
    output = varlen_attn(
        query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
        window_size=(window - 1 if window else -1, 0 if causal else -1), **options,
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output.unflatten(0, (batch, length)), None


def _dense(kernel: str, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor:
    if kernel == "flash":
        output: Tensor = kernels.FLASH(query, key, value, 0.0, causal, False, scale=scale)[0]
    else:
        output = kernels.CUDNN(query, key, value, None, True, 0.0, causal, False, scale=scale)[0]
    return output


def in_autocast_dtype(*heads: Tensor) -> tuple[Tensor, ...]:
    """Return queries, keys and values in the format of the autocast they are in, as SDPA would.

    Norms and rotary embeddings leave queries and keys in float32 under autocast; kernels take one format for all.
    """
    device_type = heads[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return heads
    return tuple(part.to(torch.get_autocast_dtype(device_type)) for part in heads)


def dense_kernel(query: Tensor, value: Tensor) -> Literal["flash", "cudnn"] | None:
    """Return the dense kernel for queries and values, ``[batch, heads, seq, head_dim]``; None where there is none."""
    head_dim = query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    if not (query.is_cuda and half and value.shape[-1] == head_dim and head_dim <= 128 and head_dim % 8 == 0):
        return None
    if torch.nn.attention.current_flash_attention_impl() is not None:
        return "flash"
    return "cudnn" if query.shape[2] > 1 else None  # its backward takes no rows of one token


def kernels_in_use() -> str:
    """Describe what computes attention, for the log."""
    package = torch.nn.attention.current_flash_attention_impl()
    if package is not None:
        return f"{package} in place of PyTorch's FlashAttention 2"
    return "cuDNN on rows of one document, FlashAttention 2 on packed rows"


def _check_options(attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    fix = "set attention to sdpa or eager"
    if attention_mask is not None:
        raise ModelError("attention varlen was given a mask: it takes packed rows, not padded ones", fix)
    if dropout:
        raise ModelError(f"attention varlen has no dropout (the model has {dropout})", fix)
    for name in ("s_aux", "softcap"):
        if kwargs.get(name) is not None:
            raise ModelError(f"attention varlen does not support {name}, which this model uses", fix)


def reject_padding(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """Stand in for transformers' mask maker: packed rows need no mask, and a padding mask would be ignored silently."""
    if attention_mask is not None:
        fix = "pack the documents, or set attention to sdpa"
        raise ModelError("attention varlen was given a padding mask", fix, "build_model.attention")


def register_attention() -> None:
    """Make ``varlen`` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, reject_padding)
