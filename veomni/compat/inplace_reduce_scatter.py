"""Parameters whose shard is the whole: gradients are cast into the buffer they stay in, and are not copied again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule


def reduce_in_place(unit: FSDPModule) -> None:
    """Give a unit that is sharded over one rank one buffer for both ends of its reduction.

    FSDP2 copies there from one to the other, 8 bytes a parameter. Experts are such a unit where as many ranks share the
    experts as share the parameters.
    """
    unit.set_custom_reduce_scatter(_OneBuffer())  # type: ignore[arg-type]


class _OneBuffer:
    """FSDP2's interface of a reduce-scatter; the input is allocated first, then the output."""

    def __init__(self) -> None:
        self._input: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer, self._input = self._input, None
        if buffer is not None and list(buffer.shape) == list(size) and buffer.dtype is dtype:
            return buffer
        self._input = torch.empty(tuple(size), dtype=dtype, device=device)
        return self._input

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        if output_tensor is not input_tensor:
            output_tensor.copy_(input_tensor)
