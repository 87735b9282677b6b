"""The allocator of a device: its segments, its history, and a call where memory has run out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def grow_segments() -> None:
    """Make the CUDA allocator use expandable segments: sizes that differ from step to step do not fragment them."""
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def record_allocations(module: Any, entries: int) -> None:
    """Record the latest ``entries`` allocations and frees of ``torch.<device_type>``, with their Python stacks."""
    module.memory._record_memory_history(max_entries=entries, stacks="python")


def stop_recording(module: Any) -> None:
    """Record no more, and drop what was recorded."""
    module.memory._record_memory_history(enabled=None)


def write_allocations(module: Any, path: Path) -> None:
    """Write what is allocated and the history, for https://pytorch.org/memory_viz."""
    module.memory._dump_snapshot(str(path))


def when_out_of_memory(call: Callable[[], None]) -> None:
    """Call ``call`` before each out-of-memory error of a CUDA device, for the life of the process."""
    torch._C._cuda_attach_out_of_memory_observer(lambda *_: call())  # type: ignore[attr-defined]
