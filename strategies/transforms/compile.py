"""Compilation block by block: the same graph serves every layer, and sharding hooks stay outside of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from veomni.compat.modules import compile_in_place
from veomni.logging import create_logger
from veomni.strategies.base import SetupContext, Stage, Strategy

if TYPE_CHECKING:
    from veomni.models.adapter.adapter import ModelAdapter

logger = create_logger(__name__)


class Compile(Strategy):
    """Compile every block with ``torch.compile``, each at its first call. An fp64 run stays uncompiled."""

    name = "compile"
    stage = Stage.COMPILATION

    @override
    def transform(self, adapter: ModelAdapter, context: SetupContext) -> None:
        if context.precision.name == "fp64":
            # TorchDynamo skips code inside a TorchDispatchMode, and logs nothing.
            logger.warning_rank0("Compile has no effect in fp64: the mode that keeps float64 cannot be compiled")
            return
        for name in context.plan.blocks:
            block = adapter.model.get_submodule(name)
            adapter.on_remove(compile_in_place(block))
