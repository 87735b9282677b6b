"""Broadcasts in buckets, timeouts of groups that exist, and several axes of a mesh as one."""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

_BUCKET_BYTES = 250 * 1024**2  # DDP's own at the start


def broadcast_all(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Overwrite tensors, of any dtype and device, by those of the group's first rank."""
    if tensors:
        dist._broadcast_coalesced(group, list(tensors), _BUCKET_BYTES, 0)  # type: ignore[attr-defined]


def limit_group(group: ProcessGroup, timeout: timedelta) -> None:
    """Set how long a collective of ``group`` waits for the other ranks."""
    _set_pg_timeout(timeout, group)


def flattened(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Return a mesh of one axis over all ranks of ``mesh``."""
    return mesh._flatten(name)
