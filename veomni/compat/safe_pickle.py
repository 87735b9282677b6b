"""The classes that the metadata of ``torch.distributed.checkpoint`` pickles, for a reader that allows no others."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from veomni.compat.private_name import PrivateName

PRIVATE = (
    PrivateName(
        "torch.distributed.checkpoint.filesystem:_StorageInfo",
        reason="where the bytes of a tensor lie",
        without="no checkpoint can be read: allow the class of its new name",
    ),
    PrivateName(
        "torch.distributed.checkpoint.metadata:_MEM_FORMAT_ENCODING",
        reason="the memory format of a tensor",
        without="no checkpoint can be read: allow the class of its new name",
    ),
    PrivateName(
        "torch.serialization:_get_layout",
        reason="the function that the layout of a tensor is pickled as",
        without="no checkpoint can be read: allow the function of its new name",
        parameters=("name",),
    ),
)
STORAGE_INFO: type = _StorageInfo
MEMORY_FORMAT: type = _MEM_FORMAT_ENCODING
LAYOUT = "_get_layout", torch.serialization._get_layout
"""The name in ``torch.serialization`` and the function."""
