"""Strategies that split the rows of a batch over ranks, and give attention the whole rows."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, ClassVar

import torch.distributed as dist
from annotated_types import Ge
from typing_extensions import override

from veomni.batch.forward_call import SequenceGroups
from veomni.batch.micro_batch import MicroBatch
from veomni.batch.split import SequenceShard
from veomni.config.section import Validated
from veomni.errors import DataError, LayoutError, ModelError
from veomni.logging import create_logger
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.adapter.passes.shared_media import share_towers
from veomni.models.traits import RunsOnShards, SplitsRows, Trait
from veomni.models.traits.rows import text_part
from veomni.models.transformers_api.attention import text_attention_of
from veomni.ops.attention.ring import register_ring
from veomni.ops.attention.ulysses import check_heads, register_ulysses
from veomni.ops.attention.ulysses_async import overlap_projections
from veomni.ops.attention.whole_rows import UNSPLIT_ATTENTION, share_rows, use_attention
from veomni.parallel.mesh import ParallelDims, ParallelState
from veomni.strategies.base import SetupContext, Stage, Strategy

logger = create_logger(__name__)

_PACKING_BACKENDS = (
    "eager", "sdpa", "flex_attention", "varlen", "ring", "flash_attention_2", "flash_attention_3", "flash_attention_4",
)  # fmt: skip


@dataclass(eq=False)
class SequenceStrategy(Validated, Strategy):
    """A strategy that splits every row over ranks.

    Rows are cut once for all such strategies together, as the mesh says; attention is wrapped by each in turn.

    Args:
        size: Ranks that share each row.
        validate_batches: Check in every micro-batch that the ranks which share a row hold the same one, for debugging
            a loader; it costs a small collective.
    """

    requires: ClassVar[tuple[type[Trait], ...]] = (SplitsRows, RunsOnShards)
    axis: ClassVar[str]  # of the mesh

    size: Annotated[int, Ge(1)]
    _: KW_ONLY
    validate_batches: bool = False

    @override
    def mesh_axes(self) -> Mapping[str, int]:
        return {self.axis: self.size}

    @override
    def check_model(self, facts: Mapping[str, Any], row_length: int, dims: ParallelDims) -> None:
        shard = SequenceShard(dims.ulysses, 0, dims.cp, 0)
        if shard.size > 1 and row_length < shard.multiple:
            sizes = f"Ulysses.size {shard.ulysses} x ContextParallel.size {shard.cp}"
            problem = f"max_seq_len {row_length} is too short for {shard.size} ranks per row ({sizes})"
            raise LayoutError(problem, f"use at least {shard.multiple}", "Ulysses.size ContextParallel.size")

    @override
    def shard(self, micro: MicroBatch, state: ParallelState) -> MicroBatch:
        cut = micro.split(state.sequence_shard)
        if self.validate_batches and cut.rows.shard.size > 1:
            _check_same_rows(cut.rows.digest, state)
        return cut

    @override
    def transform(self, adapter: ModelAdapter, context: SetupContext) -> None:
        model, state = adapter.model, context.state
        if state.size("sequence") == 1:
            return
        backend = text_attention_of(model)
        if not backend.endswith(_PACKING_BACKENDS):
            problem = f"attention {backend} does not support document boundaries (cu_seqlens)"
            fix = "set attention to auto, or to one of sdpa, eager, flex_attention and flash_attention_2 to 4"
            raise ModelError(problem, fix, "build_model.attention")
        if adapter.sequence is None:
            adapter.patch(model, UNSPLIT_ATTENTION, backend)
            ulysses, ring = (state.group(axis) if state.size(axis) > 1 else None for axis in ("ulysses", "cp"))
            adapter.sequence = SequenceGroups(state.sequence_shard, state.group("sequence"), ulysses, ring)
            share_rows(text_part(model), adapter.sequence, adapter.patch)
            share_towers(adapter, adapter.sequence)
        attention = self.install(adapter, backend, state)
        use_attention(model, attention)
        logger.info_rank0("attention over %d ranks: %s", state.size(self.axis), attention)

    @abstractmethod
    def install(self, adapter: ModelAdapter, backend: str, state: ParallelState) -> str:
        """Return the name of an attention over whole rows that runs ``backend`` inside.

        A ModelError where the model's heads do not divide, or its attention cannot be wrapped.
        """


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
    axis = "cp"

    @override
    def install(self, adapter: ModelAdapter, backend: str, state: ParallelState) -> str:
        return register_ring()


@dataclass(eq=False, kw_only=True)
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
    axis = "ulysses"

    overlap: bool = False

    @override
    def check_model(self, facts: Mapping[str, Any], row_length: int, dims: ParallelDims) -> None:
        super().check_model(facts, row_length, dims)
        if facts.get("num_attention_heads"):  # in some models they differ by layer: their attention checks each
            check_heads(facts["num_attention_heads"], self.size)

    @override
    def install(self, adapter: ModelAdapter, backend: str, state: ParallelState) -> str:
        if self.overlap:
            overlap_projections(text_part(adapter.model), state.group("ulysses"), adapter.patch)
        return register_ulysses(backend)


def _check_same_rows(digest: int, state: ParallelState) -> None:
    group = state.group("sequence")
    digests = [digest] * group.size()
    dist.all_gather_object(digests, digest, group=group)
    if len(set(digests)) > 1:
        problem = f"the {group.size()} ranks that share each row were given different rows"
        raise DataError(problem, "give the loader launcher.data_parallel, not the rank and the size of the world")
