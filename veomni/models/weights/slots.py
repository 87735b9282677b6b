"""Where modules keep their tensors, which part of one this rank holds, and a copy of a model without values."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from veomni.compat.tensors import shard_box
from veomni.errors import ModelError
from veomni.parallel.wrappers import local_shard

Box = tuple[slice, ...]
"""One slice per dimension of a full tensor."""


@dataclass(frozen=True)
class Slot:
    """A parameter or buffer of a module, by its name in the model."""

    name: str
    module: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor:
        """The tensor that is there."""
        return getattr(self.module, self.key)

    def put(self, tensor: Tensor) -> None:
        """Replace the tensor by another parameter or buffer."""
        setattr(self.module, self.key, tensor)


def slots(model: nn.Module, prefix: str = "", *, remove_duplicate: bool = True) -> Iterator[Slot]:
    """Yield the slots of a model, those of a shared module once unless ``remove_duplicate`` is false."""
    for path, module in model.named_modules(prefix=prefix, remove_duplicate=remove_duplicate):
        for named in (nn.Module.named_parameters, nn.Module.named_buffers):  # FSDP1 renames what its own methods yield
            for key, _ in named(module, recurse=False, remove_duplicate=False):
                yield Slot(f"{path}.{key}" if path else key, module, key)


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Map every name of a tied parameter to all its names, the same list for each."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def skeleton_of(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device, ties included; a ModelError for one that is sharded already."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if isinstance(tensor, DTensor):
            raise ModelError("the model is already sharded", "call setup_model before anything shards the model")
        memo[id(tensor)] = on_meta(tensor)
    return deepcopy(model, memo)


def on_meta(tensor: Tensor) -> Tensor:
    """Return a parameter or buffer like ``tensor`` on the meta device."""
    return like(tensor, tensor.detach().to("meta"))


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return ``values`` as a parameter where ``tensor`` is one, trained where that is."""
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def whole_box(shape: torch.Size) -> Box:
    """Return the box of a full tensor."""
    return tuple(slice(0, size) for size in shape)


def local_box(tensor: Tensor) -> Box:
    """Return the part of the full tensor that ``tensor`` holds on this rank; some slices may be empty."""
    return shard_box(tensor) if isinstance(tensor, DTensor) else whole_box(tensor.shape)


def copy_into(tensor: Tensor, part: Tensor) -> None:
    """Copy this rank's part into ``tensor``, casting to its dtype."""
    with torch.no_grad():
        local_shard(tensor).copy_(part)
