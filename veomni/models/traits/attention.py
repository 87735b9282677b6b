"""Attention functions of trials: one that treats every position separately, and a reference for kernels of GPUs."""

from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veomni.errors import ModelError
from veomni.ops.attention.ulysses import local_options

LENGTH = 12
"""Tokens of the row that trials run."""
POINTWISE, BOUNDED = "veomni_pointwise", "veomni_bounded"
SHARDS = 2
"""Ranks that a trial pretends to share a row with."""
NO_SHARDS = "use no sequence parallelism: leave out Ulysses and ContextParallel, or set their size to 1"


def register_attentions() -> None:
    """Make both known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, function, mask in ((POINTWISE, pointwise, _shards_mask), (BOUNDED, bounded, _no_mask)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)


def on_cpu(attention: str) -> str:
    """Return the attention that stands for ``attention`` on a CPU: itself, or the reference for its kernel."""
    return attention if attention in ("eager", "sdpa") else "sdpa" if attention == "flex_attention" else BOUNDED


calls: ContextVar[int] = ContextVar("veomni_pointwise_calls", default=0)
"""How often :func:`pointwise` was called."""


def pointwise(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Treat every position separately, and reject what shards of rows cannot have with a ModelError."""
    calls.set(calls.get() + 1)
    name = type(module).__name__
    if query.shape[2] != LENGTH or key.shape[2] != LENGTH:
        problem = f"{name} attends with {query.shape[2]} queries to {key.shape[2]} keys, not position to position"
        raise ModelError(problem, NO_SHARDS)
    if isinstance(attention_mask, Tensor) and attention_mask.shape[-2:] != (LENGTH * SHARDS, LENGTH * SHARDS):
        raise ModelError(f"{name} is given a mask that the model builds (ALiBi, or a bias)", NO_SHARDS)
    local_options(kwargs, slice(None))
    groups = query.shape[1] // key.shape[1]
    score = _weigh(query) + _weigh(key).repeat_interleave(groups, dim=1)
    return (value.repeat_interleave(groups, dim=1) * (1 + score)).transpose(1, 2).contiguous(), None


def _shards_mask(
    *, batch_size: int, q_length: int, attention_mask: Tensor | None = None, device: Any = None, **options: Any
) -> Tensor:
    if attention_mask is not None:
        raise ModelError("the model makes a padding mask", NO_SHARDS)
    length = q_length * SHARDS
    return torch.ones(batch_size, 1, length, length, dtype=torch.bool, device=device)


def _weigh(heads: Tensor) -> Tensor:
    # Uneven weights: rotary embeddings keep lengths and even sums.
    weights = torch.linspace(-1, 2, heads.shape[-1], dtype=heads.dtype, device=heads.device)
    return (heads * weights).mean(-1, keepdim=True)


def bounded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    is_causal: bool | None = None, cu_seq_lens_q: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend within the documents that the model passes on, as kernels for packed rows do."""
    length = query.shape[2]
    mask = torch.ones(length, length, dtype=torch.bool)
    if getattr(module, "is_causal", True) if is_causal is None else is_causal:
        mask = mask.tril()
    if cu_seq_lens_q is not None:
        documents = torch.searchsorted(cu_seq_lens_q[1:].long(), torch.arange(length), right=True)
        mask &= documents[:, None] == documents
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    attended = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return attended.transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **options: Any) -> None:
    return None
