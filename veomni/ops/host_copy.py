"""Values of a device tensor that the host reads without waiting for work queued after them."""

import torch
from torch import Tensor


class HostCopy:
    """An asynchronous copy of a tensor in host memory, pinned on accelerators, queued on construction.

    Reading it waits for the work queued before the copy only; reading the tensor itself would wait for all queued work
    and leave the device idle.
    """

    def __init__(self, value: Tensor) -> None:
        on_device, self._copied = value.device.type != "cpu", None
        self._copy = torch.empty_like(value, device="cpu", pin_memory=on_device)
        self._copy.copy_(value.detach(), non_blocking=True)
        if on_device:
            self._copied = torch.get_device_module(value.device).Event()
            self._copied.record()

    def read(self) -> Tensor:
        """Wait for the copy and return it, a CPU tensor of the same shape and dtype."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy
