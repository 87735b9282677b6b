"""What the losses of a document's tokens weigh, as small as can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

TokenWeights = NDArray[Any]
"""``[tokens]``: bool where every weight is 0 or 1, else float32; of 0 no loss is taken."""


def token_weights(given: Sequence[float] | None) -> TokenWeights | None:
    """Return weights as they are kept; None weighs every token 1."""
    if given is None:
        return None
    weights = np.array(given, np.float32)
    supervised = weights != 0
    return supervised if bool((weights == supervised).all()) else weights
