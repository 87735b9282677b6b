"""The classes that the metadata of ``torch.distributed.checkpoint`` pickles, for a reader that allows no others."""

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

STORAGE_INFO: type = _StorageInfo
MEMORY_FORMAT: type = _MEM_FORMAT_ENCODING
LAYOUT = "_get_layout", torch.serialization._get_layout
"""The name in ``torch.serialization`` and the function."""
