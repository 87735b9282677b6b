"""One step round a ring of ranks: tensors for the next rank, while those of the rank before come in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from veomni.ops.comm.all_to_all import AsyncAllToAll, Splits


class RingStep:
    """Tensors in flight to the next rank of a ring. Not differentiable: for use inside an autograd function.

    An all-to-all in which only neighbours have something for each other: unlike sends and receives it works on every
    backend and device that Ulysses works on, and needs no order to keep two ranks from waiting for each other.

    Args:
        tensors: Of the same shapes and dtype on all ranks.
        group: The ring.
    """

    def __init__(self, tensors: Sequence[Tensor], group: ProcessGroup) -> None:
        self._shapes = [tensor.shape for tensor in tensors]
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        size, rank = group.size(), group.rank()
        splits = Splits([0] * size, [0] * size)
        splits.sent[(rank + 1) % size] = splits.received[(rank - 1) % size] = len(flat)
        self._exchange = AsyncAllToAll.start(flat, splits, group)

    def wait(self) -> list[Tensor]:
        """Return the tensors of the rank before; to be called once."""
        parts = self._exchange.wait().split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
