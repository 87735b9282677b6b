"""Keep packed documents apart in every mask a transformers model builds.

transformers finds packed documents by itself only where a model hands its position ids to the mask maker; GPT-OSS and
others do not, and would mix documents without a word. Here the borders of the row in hand are known to the mask makers
whatever the model passes on, and are added to its own rule (causal, sliding, chunked).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from veomni.errors import ModelError
from veomni.models import hf

_documents: ContextVar[Tensor | None] = ContextVar("veomni_documents", default=None)
_STATEFUL_PARAMETERS = frozenset({"A_log", "dt_bias"})


def isolate_documents(model: nn.Module) -> None:
    """Make ``model`` keep the documents of packed rows apart, and refuse packed rows where it cannot.

    Args:
        model: A transformers model; its call must name its arguments.
    """
    _wrap_mask_makers()
    leaking = _layer_that_leaks(model)

    def announce(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        documents = document_indices(kwargs)
        if leaking is not None and documents is not None:
            raise ModelError(
                f"{leaking} carries state from one document of a packed row into the next",
                "set data.packing to none, so that every row is one document",
            )
        _documents.set(documents)

    def retire(module: nn.Module, args: Any, output: Any) -> None:
        _documents.set(None)

    model.register_forward_pre_hook(announce, with_kwargs=True)
    model.register_forward_hook(retire, always_call=True)


def document_indices(inputs: Mapping[str, Any]) -> Tensor | None:
    """Number the documents of each row.

    Args:
        inputs: A model's arguments; ``position_ids`` is ``[batch, seq]``, or ``[axes, batch, seq]`` with text first.

    Returns:
        int64 ``[batch, seq]``, or None where each row is one document, is padded, or continues a cache.
    """
    positions = inputs.get("position_ids")
    if positions is None or inputs.get("attention_mask") is not None or inputs.get("past_key_values") is not None:
        return None
    rows = positions[0] if positions.dim() == 3 else positions
    breaks = torch.diff(rows, prepend=rows[:, :1] - 1, dim=-1) != 1
    documents = breaks.cumsum(-1)
    if inputs.get("cu_seq_lens_q") is None and not bool(documents[:, -1].any()):
        return None
    return documents


def _wrap_mask_makers() -> None:
    from transformers import AttentionMaskInterface

    for name, make in hf.mask_makers().items():
        if not hasattr(make, "_veomni_packed"):
            AttentionMaskInterface.register(name, _packed(make))


def _packed(make: Callable[..., Any]) -> Callable[..., Any]:
    def make_packed(*args: Any, **options: Any) -> Any:
        documents = _documents.get()
        shape = options.get("batch_size"), options.get("q_length"), options.get("kv_length")
        if documents is None or shape != (*documents.shape, documents.shape[1]):
            return make(*args, **options)
        options["mask_function"] = hf.within_documents(options["mask_function"], documents)
        options["allow_is_causal_skip"] = False
        return make(*args, **options)

    make_packed._veomni_packed = True  # type: ignore[attr-defined]
    return make_packed


def _layer_that_leaks(model: nn.Module) -> str | None:
    """Return the name of a layer that reads the sequence outside attention (state space, linear attention)."""
    for name, module in model.named_modules():
        if _STATEFUL_PARAMETERS & module._parameters.keys():
            return f"{name} ({type(module).__name__})"
    return None
