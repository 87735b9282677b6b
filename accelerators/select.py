"""Choose an accelerator by name, or by what is there."""

from __future__ import annotations

from veomni.accelerators.base import Accelerator
from veomni.accelerators.cpu import CPU
from veomni.accelerators.cuda import CUDA
from veomni.accelerators.npu import NPU
from veomni.plugins import load_plugin


def select_accelerator(choice: str | Accelerator) -> Accelerator:
    """Return an accelerator that can be used here.

    Args:
        choice: An object, the name of an entry point in ``veomni.accelerators``, or "auto": NPU, else CUDA, else CPU.

    Raises:
        ConfigError: no accelerator has that name.
        DeviceError: the one asked for has no device here.
    """
    if isinstance(choice, Accelerator):
        accelerator = choice
    elif choice == "auto":
        accelerator = next(family() for family in (NPU, CUDA, CPU) if family.is_available())
    else:
        accelerator = load_plugin("veomni.accelerators", choice)()
    accelerator.require()
    return accelerator
