"""Offload of saved tensors to host memory from a forward to its backward, copied while the device computes."""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

IN_FLIGHT = 2
"""Tensors on the device at once while they are copied to the host; before one more, compute waits for a copy."""
_PIECE_BYTES = 1 << 26  # PyTorch rounds pinned allocations up to a power of two, so only the last piece wastes memory


class HostStack:
    """Copies tensors to the host in the order of a forward, and back in reverse, on a separate stream.

    Host memory is pinned; PyTorch's caching allocator reuses it in the next step. The CPU has no streams: copies are
    synchronous.
    """

    def __init__(self, device: torch.device) -> None:
        self._runtime = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream = None if self._runtime is None else self._runtime.Stream(device)
        self._leaving: deque[weakref.ref[Stacked]] = deque()
        self._last: weakref.ref[Stacked] | None = None

    def put(self, tensor: Tensor) -> Stacked:
        """Start to copy a contiguous tensor, which must not be written to afterwards."""
        while len(self._leaving) >= IN_FLIGHT:
            oldest = self._leaving.popleft()()
            if oldest is not None:
                oldest.leave_device()
        stacked = Stacked(self, tensor, self._last)
        self._last = weakref.ref(stacked)
        self._leaving.append(self._last)
        return stacked

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> Any:
        """Copy ``sources`` into ``targets`` after the work queued so far; return the event of its end, None on CPU."""
        with self._on_stream():
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        return None if self._stream is None else self._stream.record_event()

    def wait(self, copied: Any) -> None:
        """Make the current stream wait for the event of :meth:`copy`."""
        if self._runtime is not None:
            self._runtime.current_stream().wait_event(copied)

    @property
    def pinned(self) -> bool:
        """Whether host memory is pinned."""
        return self._runtime is not None

    def _on_stream(self) -> AbstractContextManager[Any]:
        if self._runtime is None or self._stream is None:
            return nullcontext()
        self._stream.wait_stream(self._runtime.current_stream())
        context: AbstractContextManager[Any] = self._runtime.stream(self._stream)
        return context


class Stacked:
    """One tensor of a stack. Its device memory is freed only after a pending copy from or into it."""

    def __init__(self, stack: HostStack, tensor: Tensor, previous: weakref.ref[Stacked] | None) -> None:
        self._stack, self._previous = stack, previous
        self._on_device: Tensor | None = tensor.detach()
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        pieces = self._pieces(self._on_device)
        self._on_host = [torch.empty_like(piece, device="cpu", pin_memory=stack.pinned) for piece in pieces]
        self._copied = stack.copy(self._on_host, pieces)

    def get(self) -> Tensor:
        """Return the tensor on its device, and start to fetch the previous one, which the backward needs next."""
        found = self._fetch()
        previous = None if self._previous is None else self._previous()
        if previous is not None:
            previous._fetch()
        self._stack.wait(self._copied)
        return found

    def leave_device(self) -> None:
        """Free the copy on the device."""
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
