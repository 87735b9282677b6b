"""What an accelerator is: facts about one family of devices, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from veomni.compat.allocations import record_allocations, stop_recording, when_out_of_memory, write_allocations
from veomni.errors import DeviceError
from veomni.registry import Registry

ACCELERATORS: Registry[Callable[[], Accelerator]] = Registry(
    "accelerator", group="veomni.accelerators", home="veomni.accelerators"
)
"""Accelerators by the names that configurations use."""


class Accelerator:
    """Facts about one family of devices, from ``torch.<device_type>``, which has the same functions for all of them.

    A third-party accelerator subclasses this and names itself in the entry-point group ``veomni.accelerators``.

    Attributes:
        backend: The collective backend of its devices.
        unavailable: What is wrong where none of its devices is there, and the fix.
        supports_pinned_memory: Whether copies from page-locked host memory to a device overlap with compute.
        supports_memory_history: Whether its allocator can record what it does.
    """

    name: ClassVar[str]
    device_type: ClassVar[str]
    backend: ClassVar[str]
    unavailable: ClassVar[tuple[str, str]] = ("no device is visible", "use accelerator cpu")
    supports_pinned_memory: ClassVar[bool] = True
    supports_memory_history: ClassVar[bool] = False

    @classmethod
    def module(cls) -> Any:
        """Return ``torch.<device_type>``."""
        return torch.get_device_module(cls.device_type)

    @classmethod
    def is_available(cls) -> bool:
        """Return whether a device of this family can be used here, without starting its driver context."""
        return bool(cls.module().is_available())

    @classmethod
    def device_count(cls) -> int:
        """Return how many devices this process may use."""
        return int(cls.module().device_count())

    @classmethod
    def require(cls) -> None:
        """Check that the family can be used; the DeviceError says what to install or change."""
        problem, fix = cls.unavailable
        if not cls.module().is_available():
            raise DeviceError(f"accelerator {cls.name}: {problem}", fix)

    def device(self, local_rank: int) -> torch.device:
        """Return the device of the process with this rank on its node."""
        return torch.device(self.device_type, local_rank % max(1, self.device_count()))

    def set_device(self, device: torch.device) -> None:
        """Make ``device`` this process's current device."""
        self.module().set_device(device)

    def synchronize(self) -> None:
        """Wait until all work queued on the current device is done."""
        self.module().synchronize()

    def peak_memory(self) -> int:
        """Return the most bytes allocated since :meth:`reset_peak_memory`."""
        return int(self.module().max_memory_allocated())

    def reset_peak_memory(self) -> None:
        """Start a new measurement of :meth:`peak_memory`."""
        self.module().reset_peak_memory_stats()

    def record_memory(self, entries: int, out_of_memory: Callable[[], None]) -> None:
        """Record the latest ``entries`` allocations of this process, and call back before an out-of-memory error."""
        record_allocations(self.module(), entries)
        when_out_of_memory(out_of_memory)

    def write_memory_history(self, path: Path) -> None:
        """Write what is allocated and what :meth:`record_memory` recorded, for https://pytorch.org/memory_viz."""
        write_allocations(self.module(), path)

    def stop_recording_memory(self) -> None:
        """Undo :meth:`record_memory`."""
        stop_recording(self.module())

    def total_memory(self) -> int:
        """Return the bytes of memory of the current device."""
        return int(self.module().get_device_properties(self.module().current_device()).total_memory)

    def get_rng_state(self) -> Tensor | None:
        """Return the device generator's state as a uint8 CPU tensor; None where it is the CPU generator itself."""
        state: Tensor = self.module().get_rng_state()
        return state

    def set_rng_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_rng_state` returned."""
        self.module().set_rng_state(state)

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Return the dense peak in FLOP/s of the current device for ``dtype``; None when unknown, never a guess."""
        return peak_flops_by_name(self.module().get_device_name(), dtype)

    @property
    def supports_varlen_attention(self) -> bool:
        """Whether ``torch.nn.attention.varlen`` runs on this device."""
        return False

    @property
    def supports_float8(self) -> bool:
        """Whether this device multiplies float8 operands, with a scale for the tensor or for each row."""
        return False

    @property
    def flash_packages(self) -> tuple[str, ...]:
        """PyTorch's names of the flash-attention packages that run on this device, fastest first."""
        return ()

    @property
    def experts_backends(self) -> tuple[str, ...]:
        """Backends that run mixture-of-experts layers on this device, fastest first; each but "loop" in bf16 only."""
        return ("loop",)

    def check_devices(self, processes: int, *, shared: bool) -> None:
        """Check that ``processes`` local ranks find a device each, or ``shared`` ones (over gloo); else DeviceError."""
        if not shared and processes > self.device_count():
            raise DeviceError(
                f"{processes} processes were requested but there are {self.device_count()} {self.name} devices",
                f"start at most {self.device_count()}, or use backend gloo to share devices",
                field="Launcher.devices",
            )


# From the vendors' data sheets, without sparsity. The first name found in the device's name wins: longer ones first.
_BF16_TERA_FLOPS = {
    "GB200": 2500.0, "B200": 2250.0, "GH200": 989.5, "H200": 989.5, "H100 NVL": 835.0, "H100 PCIe": 756.0,
    "H100": 989.5, "H800": 989.5, "H20": 148.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0, "L20": 119.5,
    "MI300X": 1307.4, "MI325X": 1307.4, "MI250X": 383.0,
    "Ascend910B1": 400.0, "Ascend910B2": 376.0, "Ascend910B3": 313.0, "Ascend910B4": 280.0,
}  # fmt: skip


def peak_flops_by_name(device_name: str, dtype: torch.dtype) -> float | None:
    """Return the 16-bit peak of the device called ``device_name``; None for other dtypes and unknown names."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    found = (peak for name, peak in _BF16_TERA_FLOPS.items() if name.lower() in device_name.lower())
    peak = next(found, None)
    return None if peak is None else peak * 1e12
