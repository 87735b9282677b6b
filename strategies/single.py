"""One process, one device: the reference that every other strategy must reproduce."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from typing_extensions import override

from veomni.errors import LayoutError
from veomni.strategies.base import ParameterStrategy, SetupContext
from veomni.strategies.grad_norm import sharded_grad_norm


class Single(ParameterStrategy):
    """No parallelism."""

    name = "single"

    @override
    def check(self, world_size: int) -> None:
        if world_size != 1:
            raise LayoutError(
                f"strategy single was given {world_size} ranks",
                "start one process, or use DDP, FSDP1 or FSDP2",
            )

    @override
    def parallelize(self, model: nn.Module, context: SetupContext) -> nn.Module:
        context.materialize(model, "")
        return model.to(context.device)

    @override
    def grad_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    @override
    def grad_norm(self, model: nn.Module) -> Tensor:
        return sharded_grad_norm(model.parameters(), next(model.parameters()).device)
