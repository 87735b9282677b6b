"""Whether a model keeps the documents of a packed row apart, found by trying it once it has its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veomni.models.adapter.passes.documents import remember_leak
from veomni.models.traits.trial import (
    FIRST,
    LENGTH,
    places_matter,
    seen_elsewhere,
    takes_positions,
    tokens_of,
    values_of,
)
from veomni.models.transformers_api.attention import text_attention_of
from veomni.models.transformers_api.capabilities import is_pretrained
from veomni.ops.attention.text import UNSPLIT_ATTENTION, use_attention


def try_packing(model: nn.Module, body: nn.Module, device: torch.device) -> None:
    """Let a model refuse packed rows, with the reason, where it does not keep their documents apart.

    Two documents in a row must not see each other, and must be computed the same in either order.

    Args:
        model: What users call; its parameters have values.
        body: The transformers model inside; other modules are left alone.
        device: Where the model computes.
    """
    if is_pretrained(body) and hasattr(body.config, "vocab_size"):
        remember_leak(body, _why_not(model, body, device))


def _why_not(model: nn.Module, body: Any, device: torch.device) -> str | None:
    name = type(body).__name__
    if not takes_positions(body):
        return f"{name} takes no position_ids, so it cannot tell documents apart"
    installed = text_attention_of(body)
    training = model.training
    use_attention(body, getattr(body, UNSPLIT_ATTENTION, installed))
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return _try(model.eval(), body, name, device)
    except Exception as error:  # whatever a model's own forward raises: it is refused when packed rows come
        return f"{name} does not run on packed tokens alone ({type(error).__name__}: {str(error)[:160]})"
    finally:
        use_attention(body, installed)
        model.train(training)


def _try(model: nn.Module, body: Any, name: str, device: torch.device) -> str | None:
    tokens, other = tokens_of(body.config, device)
    positions = torch.cat([torch.arange(FIRST), torch.arange(LENGTH - FIRST)]).to(device)

    def run(tokens: Tensor, positions: Tensor) -> Tensor:
        starts = (positions == 0).nonzero().flatten().tolist()
        borders = torch.tensor([*starts, LENGTH], dtype=torch.int32, device=device)
        packed = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": LENGTH, "max_length_k": LENGTH}
        return values_of(model(input_ids=tokens[None], position_ids=positions[None], use_cache=False, **packed))

    if seen_elsewhere(run, tokens, other, positions, slice(FIRST, None)):
        return f"{name} lets the documents of a packed row see each other"
    if places_matter(run, tokens, positions):
        return f"{name} computes a document by its place in the row"
    return None
