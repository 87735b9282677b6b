"""Accelerators: what a family of devices is and can do. Anything device-specific lives here and nowhere else."""

from veomni.accelerators.base import ACCELERATORS, Accelerator
from veomni.accelerators.cpu import CPU
from veomni.accelerators.cuda import CUDA
from veomni.accelerators.npu import NPU

__all__ = ["CPU", "CUDA", "NPU", "Accelerator", "find_accelerator", "select_accelerator"]

_BUILT_IN: tuple[type[Accelerator], ...] = (NPU, CUDA, CPU)  # in the order in which "auto" looks for them
for _family in _BUILT_IN:
    ACCELERATORS.register(_family.name)(_family)


@ACCELERATORS.register("auto")
def find_accelerator() -> Accelerator:
    """NPU where there is one, else CUDA, else CPU."""
    return next(family() for family in _BUILT_IN if family.is_available())


def select_accelerator(choice: str | Accelerator) -> Accelerator:
    """Return an accelerator that can be used here; ``choice`` is an object or a registered name.

    Another name is a ConfigError; one that has no device here a DeviceError.
    """
    accelerator = choice if isinstance(choice, Accelerator) else ACCELERATORS.get(choice)()
    accelerator.require()
    return accelerator
