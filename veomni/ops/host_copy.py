"""Numbers of a device that the host reads while the device works on what was queued behind them."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor in host memory, queued where it is made.

    Reading it waits until the device has come that far; reading the tensor itself would wait for all that is queued,
    and leave the device without work.
    """

    def __init__(self, value: Tensor) -> None:
        on_device, self._copied = value.device.type != "cpu", None
        self._copy = torch.empty_like(value, device="cpu", pin_memory=on_device)
        self._copy.copy_(value.detach(), non_blocking=True)
        if on_device:
            self._copied = torch.get_device_module(value.device).Event()
            self._copied.record()

    def read(self) -> Tensor:
        """Return the values, on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy
