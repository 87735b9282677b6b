"""Read ``torch.distributed.checkpoint`` files without trusting them: PyTorch's own reader unpickles what it finds."""

from __future__ import annotations

import collections
import pickle
from enum import Enum
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from typing_extensions import override

from veomni.compat.safe_pickle import LAYOUT, MEMORY_FORMAT, STORAGE_INFO
from veomni.errors import CheckpointError

_FOREIGN = "do not load this file: it was not written by a checkpointer"
_CLASSES: tuple[type, ...] = (
    BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties,
    TensorStorageMetadata, MEMORY_FORMAT, STORAGE_INFO, torch.Size, collections.OrderedDict,
)  # fmt: skip
_ALLOWED: dict[tuple[str, str], Any] = {(cls.__module__, cls.__qualname__): cls for cls in _CLASSES}
_ALLOWED["torch.serialization", LAYOUT[0]] = LAYOUT[1]
# The writer notes its own directory, as a path of the system it ran on; nothing here opens it.
_ALLOWED |= {
    (module, name): PurePosixPath
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
}
_ALLOWED |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def _enum_member(cls: Any, name: Any) -> Any:
    if cls not in _CLASSES or not issubclass(cls, Enum):
        raise CheckpointError(f"the checkpoint's .metadata asks for an attribute of {cls}", _FOREIGN)
    return cls[name]


# How early releases of Python 3.11 (Debian 12 has 3.11.2) pickle a member of an enumeration.
_ALLOWED["builtins", "getattr"] = _enum_member


class _MetadataUnpickler(pickle.Unpickler):  # only names in the table are looked up; nothing is imported
    @override
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise CheckpointError(f"the checkpoint's .metadata asks for {module}.{name}", _FOREIGN) from None


class SafeReader(FileSystemReader):
    """A file system reader whose metadata may name tensors and files of the checkpoint, and nothing else."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            metadata = _MetadataUnpickler(BytesIO(path.read_bytes())).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, LookupError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}", "use another checkpoint") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path} holds no checkpoint metadata", "use another checkpoint")
        _check_inside(metadata, path)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _check_inside(metadata: Metadata, path: Path) -> None:
    for info in (metadata.storage_data or {}).values():
        name = PurePosixPath(info.relative_path)
        if name.is_absolute() or len(name.parts) != 1 or name.name == "..":
            raise CheckpointError(f"{path} points out of its directory: {info.relative_path}", "do not load this file")


class SafePlanner(DefaultLoadPlanner):
    """A load planner that reads entries that are no tensors as plain data only."""

    @override
    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        safe = BytesIO()
        torch.save(plain, safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)
