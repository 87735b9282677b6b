"""Calls of modules: recomputed, compiled in place, wrapped, copied, counted by selective activation checkpointing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


def in_backward() -> bool:
    """Whether this thread is inside a backward: a forward is recomputed then, as torch.utils.checkpoint reads it."""
    return torch._C._current_graph_task_id() != -1


def compile_in_place(module: nn.Module, backend: str) -> Callable[[], None]:
    """Compile ``module`` at its first call, and return what undoes that."""
    own = vars(module).get("_compiled_call_impl")
    module.compile(backend=backend)

    def undo() -> None:
        del module._compiled_call_impl
        if own is not None:
            module._compiled_call_impl = own

    return undo


def run_within(module: nn.Module, around: Callable[..., Any]) -> Callable[[], None]:
    """Run calls of ``module``, with its hooks, compiled or not, as ``around(call, ...)``; return what undoes that."""
    own = vars(module).get("_compiled_call_impl")
    module._compiled_call_impl = partial(around, own or module._call_impl)

    def undo() -> None:
        del module._compiled_call_impl
        if own is not None:
            module._compiled_call_impl = own

    return undo


def clear_hooks(copy: nn.Module) -> None:
    """Remove the forward hooks of a copied module, which were made for another, and of all modules in it."""
    for module in copy.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def float8_product() -> Any:
    """Return the product of two matrices in float8."""
    return torch.ops.aten._scaled_mm.default


def profiler_marks() -> set[Any]:
    """Return the profiler's marks, which have no result, for selective activation checkpointing not to count.

    FSDP2 marks what it does inside a recomputed block, and does other things in a recomputation than in the forward.
    """
    packets = torch.ops.profiler._record_function_enter_new, torch.ops.profiler._record_function_exit
    return {getattr(packet, overload) for packet in packets for overload in packet.overloads()}
