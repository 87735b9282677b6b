"""The CPU: every strategy runs on it over gloo, so that layouts are proven without a cluster."""

import os
import resource
import sys

import torch
from torch import Tensor
from typing_extensions import override

from veomni.accelerators.base import Accelerator


class CPU(Accelerator):
    """Host processors; any number of ranks share them."""

    name = "cpu"
    device_type = "cpu"
    backend = "gloo"
    supports_pinned_memory = False
    experts_backends = ("loop", "grouped_mm")

    @override
    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    @override
    def peak_memory(self) -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    @override
    def reset_peak_memory(self) -> None:
        """Nothing to do: the kernel keeps one high-water mark for the life of a process."""

    @override
    def total_memory(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @override
    def get_rng_state(self) -> Tensor | None:
        return None

    @override
    def set_rng_state(self, state: Tensor) -> None:
        return None

    @override
    def peak_flops(self, dtype: torch.dtype) -> float | None:
        return None

    @override
    def check_devices(self, processes: int, *, shared: bool) -> None:
        return None
