"""NVIDIA GPUs, and AMD GPUs through the same PyTorch module."""

import os
from importlib.util import find_spec

import torch
from typing_extensions import override

from veomni.accelerators.base import Accelerator
from veomni.compat.allocations import grow_segments
from veomni.errors import DeviceError


class CUDA(Accelerator):
    """GPUs that PyTorch calls ``cuda``: NVIDIA's, and AMD's in a ROCm build."""

    name = "cuda"
    device_type = "cuda"
    backend = "nccl"
    supports_memory_history = True
    unavailable = (
        "no GPU is visible",
        "check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES, or use accelerator cpu",
    )

    @override
    @classmethod
    def require(cls) -> None:
        if not torch.backends.cuda.is_built():
            problem = f"accelerator cuda: this PyTorch ({torch.__version__}) was built without CUDA"
            raise DeviceError(problem, "install a CUDA or ROCm build of torch, or use accelerator cpu")
        super().require()

    @override
    def set_device(self, device: torch.device) -> None:
        """Also let the allocator's segments grow, unless the environment configures it."""
        configured = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        if torch.version.hip is None and not configured:
            grow_segments()
        super().set_device(device)

    @property
    @override
    def supports_varlen_attention(self) -> bool:
        # The kernel is FlashAttention 2, which needs Ampere or newer; a ROCm build does not have it.
        return torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)

    @property
    @override
    def supports_float8(self) -> bool:
        return torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)

    @property
    @override
    def flash_packages(self) -> tuple[str, ...]:
        if torch.version.hip is not None:
            return ()
        return {9: ("FA4", "FA3"), 10: ("FA4",)}.get(torch.cuda.get_device_capability()[0], ())

    @property
    @override
    def experts_backends(self) -> tuple[str, ...]:
        # PyTorch's grouped product has a kernel from Ampere on; those in Triton feed on Hopper's copy engine.
        if torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0):
            return ("loop",)
        if torch.cuda.get_device_capability() < (9, 0) or find_spec("triton") is None:
            return ("grouped_mm", "loop")
        return ("triton", "grouped_mm", "loop")
