"""Context parallelism: each rank holds a part of every row, and for attention keys and values are sent round a ring."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from typing_extensions import override

from veomni.errors import LayoutError
from veomni.ops.attention.ring import register_ring
from veomni.parallel.mesh import ParallelState
from veomni.strategies.base import Stage
from veomni.strategies.sequence.base import SequenceStrategy


class ContextParallel(SequenceStrategy):
    """Split every row over ranks, whatever the number of heads; attention is computed block by block on a ring.

    Rows are dealt out in a zigzag, so that every rank computes alike under a causal rule. Composes with
    :class:`Ulysses`: heads are exchanged within each group of that, keys and values are sent between the groups. See
    Liu et al., 2023 (arXiv:2310.01889).

    Args:
        size: Ranks of the ring.
        validate_batches: See :class:`SequenceStrategy`.
    """

    name = "context_parallel"
    stage = Stage.RING

    def __init__(self, size: int, *, validate_batches: bool = False) -> None:
        if size < 1:
            raise LayoutError(f"ContextParallel has size {size}", "give a positive size")
        super().__init__(validate_batches=validate_batches)
        self.size = size

    @override
    def mesh_axes(self) -> Mapping[str, int]:
        return {"cp": self.size}

    @override
    def install(self, model: nn.Module, backend: str, state: ParallelState) -> str:
        return register_ring()
