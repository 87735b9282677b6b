"""Compile each block by itself: the same graph serves every layer, and sharding hooks stay outside of it."""

from __future__ import annotations

from torch import nn

from veomni.plan import ParallelPlan


def compile_blocks(model: nn.Module, plan: ParallelPlan) -> None:
    """Compile the blocks of ``plan`` in place; each compiles at its first call."""
    for name in plan.blocks:
        model.get_submodule(name).compile()
