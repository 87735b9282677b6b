"""What CUDA and NPU devices have in common: PyTorch gives both a module with the same functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from veomni.accelerators.base import Accelerator, device_module
from veomni.accelerators.peak_flops import peak_flops_by_name


class DiscreteAccelerator(Accelerator):
    """A device with memory of its own, driven through ``torch.<device_type>``."""

    @classmethod
    def _module(cls) -> Any:
        return device_module(cls.device_type)

    @override
    @classmethod
    def is_available(cls) -> bool:
        return bool(cls._module().is_available())

    @override
    @classmethod
    def device_count(cls) -> int:
        return int(cls._module().device_count())

    @override
    def device(self, local_rank: int) -> torch.device:
        return torch.device(self.device_type, local_rank % max(1, self.device_count()))

    @override
    def set_device(self, device: torch.device) -> None:
        self._module().set_device(device)

    @override
    def synchronize(self) -> None:
        self._module().synchronize()

    @override
    def peak_memory(self) -> int:
        return int(self._module().max_memory_allocated())

    @override
    def reset_peak_memory(self) -> None:
        self._module().reset_peak_memory_stats()

    @override
    def total_memory(self) -> int:
        return int(self._module().get_device_properties(self._module().current_device()).total_memory)

    @override
    def get_rng_state(self) -> Tensor | None:
        state: Tensor = self._module().get_rng_state()
        return state

    @override
    def set_rng_state(self, state: Tensor) -> None:
        self._module().set_rng_state(state)

    @override
    def peak_flops(self, dtype: torch.dtype) -> float | None:
        return peak_flops_by_name(self._module().get_device_name(), dtype)
