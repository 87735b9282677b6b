"""A copy of a model without its values."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn

from veomni.errors import ModelError


def skeleton_of(model: nn.Module) -> nn.Module:
    """Copy a model without its values: every tensor of the copy is on the meta device, ties included.

    Raises:
        ModelError: the model is sharded.
    """
    from torch.distributed.tensor import DTensor

    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if isinstance(tensor, DTensor):
            raise ModelError("the model is already sharded", "call setup_model before anything shards the model")
        meta = tensor.detach().to("meta")
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=tensor.requires_grad) if parameter else meta
    return deepcopy(model, memo)
