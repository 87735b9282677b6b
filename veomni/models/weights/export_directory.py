"""A directory that an export appears in at once or not at all, on all ranks or with an error on all of them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from veomni.errors import ModelError, VeOmniError


@contextmanager
def published(output_dir: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the name ``output_dir`` when the body ends, and is removed if it fails.

    Raises:
        ModelError: ``output_dir`` is a file, or holds something other than an export.
    """
    check_replaceable(output_dir)
    partial = output_dir.with_name(f".{output_dir.name}.partial-{os.getpid()}")
    new_parents = [parent for parent in partial.parents if not parent.exists()]
    partial.mkdir(parents=True)
    try:
        yield partial
        _replace(partial, output_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process uses one of them by now
            for parent in new_parents:
                parent.rmdir()
        raise


def check_replaceable(output_dir: Path) -> None:
    """Accept a directory that is absent, empty, or an earlier export.

    Raises:
        ModelError: it is something else.
    """
    if output_dir.is_file():
        raise ModelError(f"{output_dir} is a file", "give a directory to export to")
    if not output_dir.is_dir() or (output_dir / "config.json").is_file():
        return
    if not all(path.name.startswith("model") and ".safetensors" in path.name for path in output_dir.iterdir()):
        raise ModelError(f"{output_dir} holds something other than an export", "give another directory, or empty it")


def raise_on_all(error: Exception | None) -> None:
    """Raise ``error`` of rank 0 there, and an error that names it on every other rank; collective."""
    if not dist.is_initialized():
        message: list[str | None] = [None]
    else:
        message = [None if error is None else f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(message, src=0)
    if error is not None:
        raise error
    if message[0] is not None:
        raise VeOmniError(f"rank 0 could not export: {message[0]}")


def _replace(partial: Path, output_dir: Path) -> None:
    previous = output_dir.with_name(f".{output_dir.name}.previous-{os.getpid()}")
    if output_dir.exists():
        output_dir.rename(previous)
    partial.rename(output_dir)
    shutil.rmtree(previous, ignore_errors=True)
