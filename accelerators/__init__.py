"""Accelerators: what a family of devices is and can do. Anything device-specific lives here and nowhere else."""

from veomni.accelerators.base import Accelerator
from veomni.accelerators.cpu import CPU
from veomni.accelerators.cuda import CUDA
from veomni.accelerators.npu import NPU
from veomni.accelerators.select import select_accelerator

__all__ = ["CPU", "CUDA", "NPU", "Accelerator", "select_accelerator"]
