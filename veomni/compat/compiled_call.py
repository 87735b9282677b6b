"""Compilation of a module in place that can be undone."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from veomni.compat.private_name import PrivateName

PRIVATE = (
    PrivateName(
        "torch.nn:Module._compiled_call_impl",
        reason="Module.compile() keeps the compiled call there, and has no way back",
        without="a compiled module cannot be given back plain",
    ),
)


def compile_in_place(module: nn.Module) -> Callable[[], None]:
    """Compile ``module`` at its first call, and return what undoes that."""
    before = module._compiled_call_impl
    module.compile()

    def undo() -> None:
        module._compiled_call_impl = before

    return undo
