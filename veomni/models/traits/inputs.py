"""What a trial runs a model on: one short row of tokens, and what its outputs are compared by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LENGTH = 12
FIRST = 5
"""Length of the first of two documents, and by how much a row is rotated."""
_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_SPECIAL = ("_token_id", "_token_index")

Run = Callable[[Tensor, Tensor], Tensor]
"""From tokens ``[seq]`` and position ids ``[seq]`` to outputs ``[seq, channels]``."""


def tokens_of(config: Any, device: torch.device) -> tuple[Tensor, int]:
    """Return ``LENGTH`` different tokens of a configuration's vocabulary, where it has as many, and another one.

    None of them is special to the model: a placeholder would need an image.
    """
    vocabulary = config.get_text_config().vocab_size
    facts = {**config.get_text_config().to_dict(), **config.to_dict()}
    special = {value for name, value in facts.items() if name.endswith(_SPECIAL) and isinstance(value, int)}
    ordinary = [token for token in range(3, vocabulary) if token not in special] or list(range(vocabulary))
    *tokens, other = (ordinary[7 * place % len(ordinary)] for place in range(LENGTH + 1))
    return torch.tensor(tokens, device=device), other


def influence(run: Run, tokens: Tensor, other: int, positions: Tensor, elsewhere: slice) -> float:
    """Return how much the token ``other`` at place ``FIRST - 1`` changes outputs at other places, in tolerances."""
    reference = run(tokens, positions)
    changed = tokens.clone()
    changed[FIRST - 1] = other
    return _difference(run(changed, positions)[elsewhere], reference[elsewhere], reference)


def displacement(run: Run, tokens: Tensor, positions: Tensor) -> float:
    """Return how much rotating tokens and position ids together does beside rotating the outputs, in tolerances."""
    reference = run(tokens, positions)
    rotated = run(tokens.roll(-FIRST), positions.roll(-FIRST))
    return _difference(rotated, reference.roll(-FIRST, 0), reference)


def _difference(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    errors = (found - expected).abs().amax(-1)
    # In half precision one rounding can choose another expert for a token; positions that really differ are many.
    error = errors.median() if found.dtype.itemsize == 2 else errors.max()
    limit = _TOLERANCE[found.dtype] * scale.abs().max()
    ratio = float(error / limit)
    return ratio if math.isfinite(ratio) else 0.0 if bool(error <= limit) else math.inf
