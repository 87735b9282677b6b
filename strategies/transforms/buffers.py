"""Buffers that a forward changes are the same on all ranks, as torch's DDP keeps them."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from veomni.compat.collectives import broadcast_all
from veomni.models.adapter.adapter import ModelAdapter
from veomni.strategies.base import SetupContext, Stage, Strategy


class SharedBuffers(Strategy):
    """Give all ranks the first rank's buffers after every forward in training.

    The first rank's statistics (a BatchNorm's running mean) are those of torch's DDP, which sends them before the next
    forward; here evaluation and checkpoints between two forwards also see the same ones on every rank.
    """

    name = "shared_buffers"
    stage = Stage.PRECISION

    @override
    def transform(self, adapter: ModelAdapter, context: SetupContext) -> None:
        model, places, group = adapter.model, _changing_buffers(adapter.model), context.state.group("loss")

        def share(*call: Any) -> None:
            if model.training and torch.is_grad_enabled():
                # The data alone: autograd saves running statistics, and does not read them in training.
                broadcast_all([getattr(module, name).data for module, name in places], group)

        if places and group.size() > 1:
            adapter.hook(model, share)


def _changing_buffers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return modules and names of the buffers that a forward may change: persistent ones, but transformers' own."""
    persistent = model.state_dict().keys()
    return [
        (module, name)
        for prefix, module in model.named_modules()
        if not type(module).__module__.startswith("transformers.")
        for name, buffer in module.named_buffers(recurse=False)
        if isinstance(buffer, Tensor) and (f"{prefix}.{name}" if prefix else name) in persistent
    ]
