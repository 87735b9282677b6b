"""Dense matrix peaks by device name, in FLOP/s, from the vendors' data sheets (without sparsity)."""

import torch

# The first name found in the device's name wins, so longer names come first.
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
