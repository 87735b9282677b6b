"""Operations that selective activation checkpointing does not count: marks of the profiler, which have no result.

FSDP2 marks what it does inside a recomputed block, and does other things in a recomputation than in the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import checkpoint

from veomni.compat.private_name import PrivateName

_MARKS = "torch:ops.profiler._record_function"
_REASON = "from torch 2.13 on, each operation of a recomputation must have one in the forward"
PRIVATE = (
    PrivateName(f"{_MARKS}_enter_new", reason=_REASON, without="selective checkpointing of experts under FSDP2 fails"),
    PrivateName(f"{_MARKS}_exit", reason=_REASON, without="selective checkpointing of experts under FSDP2 fails"),
)


def _marks() -> set[Any]:
    packets = torch.ops.profiler._record_function_enter_new, torch.ops.profiler._record_function_exit
    return {getattr(packet, overload) for packet in packets for overload in packet.overloads()}


def install() -> None:
    """Leave the profiler's marks out of the count."""
    checkpoint.SAC_IGNORED_OPS.update(_marks())


def uninstall() -> None:
    """Count them, as PyTorch does."""
    checkpoint.SAC_IGNORED_OPS.difference_update(_marks())
