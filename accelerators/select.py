"""Choose an accelerator by name, or by what is there."""

from __future__ import annotations

from veomni.accelerators.base import Accelerator
from veomni.accelerators.cpu import CPU
from veomni.accelerators.cuda import CUDA
from veomni.accelerators.npu import NPU
from veomni.plugins import load_plugin

_BUILT_IN: tuple[type[Accelerator], ...] = (NPU, CUDA, CPU)
"""In the order in which "auto" looks for them."""


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
        accelerator = next(family() for family in _BUILT_IN if family.is_available())
    else:
        accelerator = load_plugin("veomni.accelerators", choice, {family.name: family for family in _BUILT_IN})()
    accelerator.require()
    return accelerator
