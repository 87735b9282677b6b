"""Compile each block by itself: the same graph serves every layer, and sharding hooks stay outside of it."""

from __future__ import annotations

from torch import nn

from veomni.logging import create_logger
from veomni.parallel.plan import ParallelPlan
from veomni.strategies.transforms.precision import Precision

logger = create_logger(__name__)


def compile_blocks(model: nn.Module, plan: ParallelPlan, precision: Precision) -> None:
    """Compile the blocks of ``plan`` in place; each compiles at its first call. An fp64 run stays uncompiled."""
    if precision.name == "fp64":
        # TorchDynamo skips whatever runs inside a TorchDispatchMode, and says nothing.
        logger.warning_rank0("compile changes nothing in fp64: what keeps float64 throughout cannot be compiled")
        return
    for name in plan.blocks:
        model.get_submodule(name).compile()
