"""Buffers that a forward changes are the same on all ranks, as torch's DDP keeps them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from typing_extensions import override

from veomni.batch.forward_call import ForwardCall
from veomni.compat.collectives import broadcast_all
from veomni.models.adapter.adapter import InputPass, Stage


class ShareBuffers(InputPass):
    """Give all ranks the first rank's buffers after every forward in training.

    The first rank's statistics (a BatchNorm's running mean) are those of torch's DDP, which sends them before the next
    forward; here evaluation and checkpoints between two forwards also see the same ones on every rank.

    Args:
        model: The model.
        group: The ranks that hold copies of it.
    """

    stage: ClassVar[Stage] = Stage.PRECISION

    def __init__(self, model: nn.Module, group: ProcessGroup) -> None:
        self.model, self.group = model, group
        self.places = changing_buffers(model)

    @override
    def close(self, call: ForwardCall) -> None:
        if not (self.model.training and torch.is_grad_enabled()):
            return
        # The data alone: autograd saves running statistics, and does not read them in training.
        found = [getattr(module, name).data for module, name in self.places]
        broadcast_all(found, self.group)


def changing_buffers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return modules and names of the buffers that a forward may change: persistent ones, but transformers' own."""
    persistent = model.state_dict().keys()
    return [
        (module, name)
        for prefix, module in model.named_modules()
        if not type(module).__module__.startswith("transformers.")
        for name, buffer in module.named_buffers(recurse=False)
        if isinstance(buffer, Tensor) and (f"{prefix}.{name}" if prefix else name) in persistent
    ]
