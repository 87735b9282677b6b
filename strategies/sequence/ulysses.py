"""Ulysses sequence parallelism: each rank holds a part of every row, and for attention a part of the heads."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from typing_extensions import override

from veomni.errors import LayoutError
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.traits.sequence_layers import text_part
from veomni.ops.attention.ulysses import register_ulysses
from veomni.ops.attention.ulysses_async import overlap_projections
from veomni.parallel.mesh import ParallelState
from veomni.strategies.base import Stage
from veomni.strategies.sequence.base import SequenceStrategy


class Ulysses(SequenceStrategy):
    """Split every row over ranks; before attention exchange positions for heads, and back after it.

    Works beside any strategy that holds parameters, for every model whose attention goes through transformers'
    attention interface. See Jacobs et al., 2023 (arXiv:2309.14509).

    Args:
        size: Ranks that share each row; must divide the number of attention heads.
        overlap: Exchange queries while keys are projected, and keys while values are; the backward mirrors it. For
            attention modules of the standard q/k/v/o form, which most language models have.
        validate_batches: See :class:`SequenceStrategy`.
    """

    name = "ulysses"
    stage = Stage.ULYSSES

    def __init__(self, size: int, *, overlap: bool = False, validate_batches: bool = False) -> None:
        if size < 1:
            raise LayoutError(f"Ulysses has size {size}", "give a positive size")
        super().__init__(validate_batches=validate_batches)
        self.size, self.overlap = size, overlap

    @override
    def mesh_axes(self) -> Mapping[str, int]:
        return {"ulysses": self.size}

    @override
    def install(self, model: nn.Module, backend: str, state: ParallelState) -> str:
        if self.overlap:
            overlap_projections(text_part(model), state.group("ulysses"), ModelAdapter.of(model).patch)
        return register_ulysses(backend)
