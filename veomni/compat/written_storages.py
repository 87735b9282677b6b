"""Which storages operations write to."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from veomni.compat.dispatch_mode import TorchDispatchMode
from veomni.compat.private_name import PrivateName

PRIVATE = (
    PrivateName("torch:UntypedStorage._cdata", "distinguishes storages on the meta device", "AttributeError"),
    PrivateName("torch:ops.aten.add_.Tensor._schema", "marks operations that write", "AttributeError"),
)


def storage_key(tensor: Tensor) -> int:
    """Return a number that tensors share which share a storage; it need not have memory."""
    return int(tensor.untyped_storage()._cdata)


class WrittenStorages(TorchDispatchMode):
    """Records the storages that in-place operations write to, by :func:`storage_key`."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and isinstance(args[0], Tensor):
            self.keys.add(storage_key(args[0]))
        return func(*args, **(kwargs or {}))
