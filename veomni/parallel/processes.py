"""The process group that all ranks are in."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


def init_process_group(device: torch.device, backend: str, *, rank: int, world_size: int, timeout: timedelta) -> None:
    """Make the process group of the world, for tensors on the CPU and on ``device``; one that is there stays.

    Args:
        device: Where this rank computes.
        backend: Of tensors on it; those on the CPU go over gloo.
        rank: This process's place.
        world_size: Number of processes.
        timeout: How long a collective waits for the other ranks.
    """
    if dist.is_initialized():
        return
    backends = f"cpu:gloo,{device.type}:{backend}" if device.type != "cpu" else "gloo"
    store = dist.HashStore() if world_size == 1 else None  # type: ignore[attr-defined]
    dist.init_process_group(backends, store=store, rank=rank, world_size=world_size, timeout=timeout)
