"""Token ids and what their losses weigh, as small as can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokens:
    """A document, or a part of one: integer ids ``[tokens]``, and what the loss of each weighs, ``[tokens]``.

    Weights are bool where they are 0 or 1, else float32; None weighs all 1.
    """

    ids: NDArray[Any]
    weights: NDArray[Any] | None = None

    @classmethod
    def of(cls, ids: Sequence[int], weights: Sequence[float] | NDArray[Any] | None = None) -> Tokens:
        """Return ids of 32 bits, and weights as bool where in float32 each is 0 or 1."""
        if weights is None:
            return cls(np.array(ids, np.int32))
        given = np.array(weights, np.float32)
        supervised = given != 0
        return cls(np.array(ids, np.int32), supervised if bool((given == supervised).all()) else given)

    @property
    def supervised(self) -> NDArray[np.bool_]:
        """Which tokens weigh something."""
        return np.ones(len(self.ids), np.bool_) if self.weights is None else self.weights != 0

    @property
    def fractional(self) -> bool:
        """Whether some token weighs neither 0 nor 1."""
        return self.weights is not None and self.weights.dtype == np.float32

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Tokens:
        return Tokens(self.ids[part], None if self.weights is None else self.weights[part])


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills rows: the tokenizer's own, or the one that ends a document."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    return int((pad if pad is not None else end) or 0)
