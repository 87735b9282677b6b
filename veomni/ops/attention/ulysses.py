"""Attention over a sequence that is split over ranks, in transformers' attention signature.

Each rank gives its part of the positions of all heads, receives all positions of its part of the heads, runs any
attention of transformers on them as if nothing were split, and exchanges the result back.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from veomni.batch.fields import scope_of
from veomni.errors import ModelError
from veomni.models.transformers_api.attention import ConfigWithAttention, attention_of, eager_attention
from veomni.ops.attention.whole_rows import SEQUENCE_GROUPS, group_of, register_whole_rows
from veomni.ops.comm.sequence_exchange import gather_heads_scatter_seq, gather_seq_scatter_heads

_PER_HEAD = ("s_aux", "sinks")
HEADS_EXCHANGED = "heads_exchanged"
"""The attribute that is True on a module which exchanges heads before it attends, and after it."""


def exchanges_heads(module: nn.Module) -> bool:
    """Whether the attention that transformers calls for an attention module now is Ulysses'."""
    from transformers import AttentionInterface

    return isinstance(AttentionInterface().get(attention_of(module)), UlyssesAttention)


class UlyssesAttention:
    """What transformers calls in place of its attention ``backend``; the ranks are those of the module."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attend over the whole sequence; see ``AttentionBackend.function``.

        Queries, keys and values are of ``seq / P`` positions; key heads are repeated where P does not divide them. The
        mask, ``[batch or 1, heads or 1, seq, seq]`` or None, and cu_seqlens are of whole rows. Sinks are cut to this
        rank's heads. Heads that do not divide, and what cannot be split with certainty, are a ModelError.
        """
        group = group_of("ulysses", getattr(module, SEQUENCE_GROUPS, None))
        size = group.size()
        exchanged = getattr(module, HEADS_EXCHANGED, False)
        if not exchanged:
            check_heads(query.shape[1], size)
            parts = [part.transpose(1, 2) for part in (query, key, value)]
            parts = [parts[0], *(repeat_heads(part, size) for part in parts[1:])]
            query, key, value = (part.transpose(1, 2) for part in gather_seq_scatter_heads(parts, group))
        local = _LocalHeads(module, self.backend, query.shape[1], key.shape[1], group.rank())
        mask = _local_mask(attention_mask, query, query.shape[1] * size, local)
        options = local_options(kwargs, local.heads)
        output, _ = self._backend(module)(local, query, key, value, mask, **options)
        return (output if exchanged else gather_heads_scatter_seq(output, group)), None

    def _backend(self, module: nn.Module) -> Callable[..., Any]:
        from transformers import AttentionInterface

        # Eager attention is not in the registry: each modeling file brings its own.
        own = eager_attention(module) if self.backend == "eager" else AttentionInterface()[self.backend]
        if own is None:
            problem = f"{type(module).__name__} has no eager attention"
            raise ModelError(problem, "set attention to sdpa", "build_model.attention")
        return own


class _LocalHeads:
    """An attention module as the backend may see it: with this rank's share of the heads, and as if it were alone."""

    def __init__(self, module: nn.Module, backend: str, heads: int, kv_heads: int, rank: int) -> None:
        self._module = module
        self.config = ConfigWithAttention(module.config, backend)
        self.heads = slice(rank * heads, (rank + 1) * heads)
        self.num_key_value_groups = heads // kv_heads

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value[self.heads] if name in _PER_HEAD else value


def local_options(kwargs: dict[str, Any], heads: slice) -> dict[str, Any]:
    """Return what a model passes to its attention beside queries, keys, values and a mask, cut to some heads.

    A tensor without a rule for splitting it is a ModelError.
    """
    options = {name: value for name, value in kwargs.items() if scope_of(name) != "token"}  # of this rank's shard only
    for name, value in options.items():
        if not isinstance(value, Tensor) or scope_of(name) == "row" or not value.dim():
            continue
        if name not in _PER_HEAD:
            problem = f"the model passes {name} to its attention, which Ulysses cannot split"
            raise ModelError(problem, "set Ulysses.size to 1", "Ulysses.size")
        options[name] = value[heads]
    return options


def _local_mask(mask: Any, query: Tensor, heads: int, local: _LocalHeads) -> Any:
    if not isinstance(mask, Tensor):
        return mask
    length = query.shape[2]
    if mask.shape[-2:] != (length, length):
        problem = f"the model's attention mask is {list(mask.shape)}, not of the whole row of {length} positions"
        raise ModelError(problem, "set Ulysses.size to 1: this model builds masks of its own", "Ulysses.size")
    return mask[:, local.heads] if mask.shape[1] == heads > 1 else mask


def check_heads(heads: int, size: int) -> None:
    """Check that ranks can share a number of attention heads; a ModelError where ``size`` does not divide it."""
    if heads % size:
        divisors = ", ".join(str(divisor) for divisor in range(1, heads + 1) if heads % divisor == 0)
        raise ModelError(
            f"{heads} attention heads cannot be shared by {size} ranks (Ulysses.size)",
            f"use one of {divisors}, or ContextParallel.size",
            field="Ulysses.size ContextParallel.size",
        )


def repeat_heads(tensor: Tensor, size: int) -> Tensor:
    """Repeat the heads of ``[batch, seq, heads, head_dim]`` until ``size`` ranks can share them."""
    repeats = math.lcm(tensor.shape[2], size) // tensor.shape[2]
    return tensor.repeat_interleave(repeats, dim=2) if repeats > 1 else tensor


def register_ulysses(backend: str) -> str:
    """Make Ulysses around ``backend`` known to transformers, mask maker included, and return its name."""

    def make_mask(**options: Any) -> Any:
        from transformers import AttentionMaskInterface

        return AttentionMaskInterface()[backend](**options)

    # transformers looks names with "flash" in them up on the hub.
    name = "ulysses_" + backend.replace("flash_attention_", "fa")
    return register_whole_rows(name, "ulysses", UlyssesAttention(backend), make_mask)
