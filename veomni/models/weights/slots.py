"""Where modules keep their tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """A parameter or buffer of a module, by its name in the model."""

    name: str
    module: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor:
        """The tensor; setting a slot's is :meth:`put`."""
        tensor: Tensor = getattr(self.module, self.key)
        return tensor

    def put(self, tensor: Tensor) -> None:
        """Replace the tensor by another of its kind."""
        setattr(self.module, self.key, tensor)


def slots(model: nn.Module, prefix: str = "", *, remove_duplicate: bool = True) -> Iterator[Slot]:
    """Yield the slots of a model, those of a shared module once unless ``remove_duplicate`` is false."""
    for path, module in model.named_modules(prefix=prefix, remove_duplicate=remove_duplicate):
        for named in (nn.Module.named_parameters, nn.Module.named_buffers):  # FSDP1 renames what its own methods yield
            for key, _ in named(module, recurse=False, remove_duplicate=False):
                yield Slot(f"{path}.{key}" if path else key, module, key)
