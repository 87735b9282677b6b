"""Dense matrix peaks by device name, in FLOP/s, from the vendors' data sheets (without sparsity)."""

from __future__ import annotations

import torch

_TERA = 1e12
# The first name found in the device's name wins, so longer names come first.
_BF16_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.5),
    ("H200", 989.5),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.5),
    ("H800", 989.5),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L20", 119.5),
    ("MI300X", 1307.4),
    ("MI325X", 1307.4),
    ("MI250X", 383.0),
    ("Ascend910B1", 400.0),
    ("Ascend910B2", 376.0),
    ("Ascend910B3", 313.0),
    ("Ascend910B4", 280.0),
)


def peak_flops_by_name(device_name: str, dtype: torch.dtype) -> float | None:
    """Return the 16-bit peak of the device called ``device_name``; None for other dtypes and unknown names."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    for name, tera_flops in _BF16_PEAKS:
        if name.lower() in device_name.lower():
            return tera_flops * _TERA
    return None
