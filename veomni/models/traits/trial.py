"""Try a model on a short row, to see which positions see each other and where they think they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LENGTH = 12
FIRST = 5
"""Length of the first of two documents, and by how much a row is rotated."""
_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}

_SPECIAL = ("_token_id", "_token_index")

Run = Callable[[Tensor, Tensor], Tensor]
"""From tokens ``[seq]`` and position ids ``[seq]`` to outputs ``[seq, channels]``."""


def seen_elsewhere(run: Run, tokens: Tensor, other: int, positions: Tensor, elsewhere: slice) -> bool:
    """Whether the token ``other`` at place ``FIRST - 1`` changes the output at other places."""
    reference = run(tokens, positions)
    changed = tokens.clone()
    changed[FIRST - 1] = other
    return _differ(run(changed, positions)[elsewhere], reference[elsewhere], reference)


def places_matter(run: Run, tokens: Tensor, positions: Tensor) -> bool:
    """Whether rotating tokens together with their position ids does more than rotate the output."""
    reference = run(tokens, positions)
    rotated = run(tokens.roll(-FIRST), positions.roll(-FIRST))
    return _differ(rotated, reference.roll(-FIRST, 0), reference)


def tokens_of(config: Any, device: torch.device) -> tuple[Tensor, int]:
    """Return ``LENGTH`` different tokens of a configuration's vocabulary, where it has as many, and another one.

    None of them is special to the model: a placeholder would want an image.
    """
    vocabulary = config.get_text_config().vocab_size
    facts = {**config.get_text_config().to_dict(), **config.to_dict()}
    special = {value for name, value in facts.items() if name.endswith(_SPECIAL) and isinstance(value, int)}
    ordinary = [token for token in range(3, vocabulary) if token not in special] or list(range(vocabulary))
    *tokens, other = (ordinary[7 * place % len(ordinary)] for place in range(LENGTH + 1))
    return torch.tensor(tokens, device=device), other


def takes_positions(model: nn.Module) -> bool:
    """Whether the forward of a model names both token ids and position ids."""
    parameters = inspect.signature(type(model).forward).parameters
    return "input_ids" in parameters and "position_ids" in parameters


def values_of(output: Any) -> Tensor:
    """Return what a transformers model says about each position of its first row, ``[seq, channels]``."""
    logits = getattr(output, "logits", None)
    values: Tensor = output[0] if logits is None else logits
    return values[0]


def _differ(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    errors = (found - expected).abs().amax(-1)
    # In half precision one rounding can choose another expert for a token; positions that really differ are many.
    error = errors.median() if found.dtype.itemsize == 2 else errors.max()
    return not bool(error <= _TOLERANCE[found.dtype] * scale.abs().max())
