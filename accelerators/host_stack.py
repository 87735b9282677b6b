"""Tensors that wait in host memory from a forward to its backward, copied while the device computes."""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

IN_FLIGHT = 2
"""Tensors that are still on the device while they are copied to the host; before a third one, compute waits."""
_PIECE_BYTES = 1 << 26  # PyTorch rounds pinned memory up to a power of two: pieces of one waste nothing


class HostStack:
    """Copies tensors to the host in the order of a forward, and back in that of its backward, on a stream of its own.

    Host memory is pinned; PyTorch's allocator gives that of one step out again in the next. The CPU has no streams:
    copies are made at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._runtime = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream = None if self._runtime is None else self._runtime.Stream(device)
        self._leaving: deque[weakref.ref[Stacked]] = deque()
        self._last: weakref.ref[Stacked] | None = None

    def put(self, tensor: Tensor) -> Stacked:
        """Start to copy a contiguous tensor, which must not change any more."""
        while len(self._leaving) >= IN_FLIGHT:
            oldest = self._leaving.popleft()()
            if oldest is not None:
                oldest.leave_device()
        stacked = Stacked(self, tensor, self._last)
        self._last = weakref.ref(stacked)
        self._leaving.append(self._last)
        return stacked

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> Any:
        """Queue copies behind what is queued by now, beside what comes later; return the event behind them."""
        with self._beside():
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        return None if self._stream is None else self._stream.record_event()

    def wait(self, copied: Any) -> None:
        """Let what is queued from now on wait for copies."""
        if self._runtime is not None:
            self._runtime.current_stream().wait_event(copied)

    @property
    def pinned(self) -> bool:
        """Whether host memory has to be pinned."""
        return self._runtime is not None

    def _beside(self) -> AbstractContextManager[Any]:
        if self._runtime is None or self._stream is None:
            return nullcontext()
        self._stream.wait_stream(self._runtime.current_stream())
        context: AbstractContextManager[Any] = self._runtime.stream(self._stream)
        return context


class Stacked:
    """One tensor of a stack. Its memory on the device is given up only behind a copy that reads or fills it."""

    def __init__(self, stack: HostStack, tensor: Tensor, below: weakref.ref[Stacked] | None) -> None:
        self._stack, self._below = stack, below
        self._on_device: Tensor | None = tensor.detach()
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        pieces = self._pieces(self._on_device)
        self._on_host = [torch.empty_like(piece, device="cpu", pin_memory=stack.pinned) for piece in pieces]
        self._copied = stack.copy(self._on_host, pieces)

    def get(self) -> Tensor:
        """Return the tensor on its device, and start to fetch the one below."""
        found = self._fetch()
        below = None if self._below is None else self._below()
        if below is not None:
            below._fetch()
        self._stack.wait(self._copied)
        return found

    def leave_device(self) -> None:
        """Keep the tensor on the host alone."""
        if self._on_device is not None:
            self._stack.wait(self._copied)
            self._on_device = None

    def __del__(self) -> None:
        self.leave_device()

    def _fetch(self) -> Tensor:
        if self._on_device is None:
            self._on_device = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._copied = self._stack.copy(self._pieces(self._on_device), self._on_host)
        return self._on_device

    def _pieces(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.view(-1).split(_PIECE_BYTES // tensor.element_size()))
