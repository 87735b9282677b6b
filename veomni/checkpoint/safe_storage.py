"""Read ``torch.distributed.checkpoint`` files without trusting them: PyTorch's own reader unpickles what it finds."""

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
        raise CheckpointError(f"the checkpoint's .metadata refers to an attribute of {cls}", _FOREIGN)
    return cls[name]


# How early releases of Python 3.11 (Debian 12 has 3.11.2) pickle a member of an enumeration.
_ALLOWED["builtins", "getattr"] = _enum_member


class MetadataUnpickler(pickle.Unpickler):
    """Looks names up in a table of what metadata is made of; nothing is imported."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise CheckpointError(f"the checkpoint's .metadata refers to {module}.{name}", _FOREIGN)
        return _ALLOWED[module, name]


class SafeReader(FileSystemReader):
    """A file system reader whose metadata may name tensors and files of the checkpoint, and nothing else."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            metadata = MetadataUnpickler(BytesIO(path.read_bytes())).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, LookupError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}", "use another checkpoint") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path} holds no checkpoint metadata", "use another checkpoint")
        for name in (info.relative_path for info in (metadata.storage_data or {}).values()):
            if name in ("", ".", "..") or "/" in name:
                raise CheckpointError(f"{path} points out of its directory: {name}", "do not load this file")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """A load planner that reads entries that are no tensors as plain data only."""

    @override
    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        safe = BytesIO()
        torch.save(torch.load(value, weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)
