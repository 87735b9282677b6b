"""Broadcasts in buckets, groups by name and their timeouts, and several axes of a mesh as one."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group, _set_pg_timeout  # type: ignore[attr-defined]

_BUCKET_BYTES = 250 * 1024**2  # DDP's own at the start


def broadcast_all(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Overwrite tensors, of any dtype and device, by those of the group's first rank."""
    if tensors:
        dist._broadcast_coalesced(group, list(tensors), _BUCKET_BYTES, 0)  # type: ignore[attr-defined]


def limit_group(group: ProcessGroup, timeout: timedelta) -> None:
    """Set how long a collective of ``group`` waits for the other ranks."""
    _set_pg_timeout(timeout, group)


def group_named(name: str) -> ProcessGroup:
    """Return the process group that has a ``group_name``."""
    found: ProcessGroup = _resolve_process_group(name)  # type: ignore[arg-type]
    return found


def group_key(group: ProcessGroup) -> str:
    """Return what a compiled graph holds of a group: its name, size and rank.

    Dynamo guards the name alone, and names are given again once the default group was destroyed. Traced code that reads
    this text from an attribute is compiled again for another size or rank.
    """
    return f"{group.group_name} {group.size()} {group.rank()}"


def start_all_to_all(rows: Tensor, size: int, group: str) -> Tensor:
    """Start to send each of ``size`` ranks its entry of the first dimension; what is returned is to be awaited."""
    received: Tensor = torch.ops._c10d_functional.all_to_all_single(rows, [1] * size, [1] * size, group)
    return received


def await_collective(received: Tensor) -> Tensor:
    """Return what a collective was started for, when it is there."""
    found: Tensor = torch.ops._c10d_functional.wait_tensor(received)
    return found


def flattened(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Return a mesh of one axis over all ranks of ``mesh``."""
    return mesh._flatten(name)
