"""Offload to host memory of the inputs that blocks save for the backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from veomni.ops.host_stack import HostStack, Stacked


class InputOffload:
    """Runs calls of blocks so that the inputs they save for the backward are kept in host memory.

    Inputs are the floating-point tensors that gradients flow to: masks and rotary tables, which all blocks share, stay.
    """

    def __init__(self, stack: HostStack) -> None:
        self._stack = stack

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return ``call(*args, **kwargs)``, the forward of a block, with its saved inputs offloaded."""
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        inputs = [value for value in (*args, *kwargs.values()) if _is_input(value)]
        with saved_tensors_hooks(_Saved(self._stack, inputs), _restore):
            return call(*args, **kwargs)


def _is_input(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_floating_point() and value.is_contiguous()


class _Saved:
    """Offloads each input once, found by its storage and layout; other tensors are saved as they are."""

    def __init__(self, stack: HostStack, inputs: list[Tensor]) -> None:
        self._stack = stack
        self._inputs: dict[Any, Stacked | None] = {_place(tensor): None for tensor in inputs}

    def __call__(self, tensor: Tensor) -> Tensor | Stacked:
        place = _place(tensor)
        if place not in self._inputs:
            return tensor
        stacked = self._inputs[place]
        if stacked is None:
            stacked = self._inputs[place] = self._stack.put(tensor)
        return stacked


def _place(tensor: Tensor) -> Any:
    """Return a key that is equal for two tensors with the same memory and layout."""
    layout = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    return (tensor.untyped_storage().data_ptr(), *layout)


def _restore(saved: Tensor | Stacked) -> Tensor:
    return saved.get() if isinstance(saved, Stacked) else saved
