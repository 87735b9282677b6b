"""One process, one device: the reference that every other strategy must reproduce."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from typing_extensions import override

from veomni.errors import LayoutError
from veomni.strategies.base import ParameterStrategy, SetupContext


class Single(ParameterStrategy):
    """No parallelism."""

    name = "single"

    @override
    def check(self, world_size: int) -> None:
        if world_size != 1:
            problem = f"strategy single was given {world_size} ranks"
            raise LayoutError(problem, "start one process, or use DDP, FSDP1 or FSDP2")

    @override
    def parallelize(self, model: nn.Module, context: SetupContext) -> nn.Module:
        context.materialize(model, "")
        return model.to(context.device)

    @override
    def grad_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        return nullcontext()
