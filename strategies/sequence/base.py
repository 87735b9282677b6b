"""What Ulysses and context parallelism have in common: rows shared by several ranks, attention over the whole row."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn
from typing_extensions import override

from veomni.batch.forward_call import SequenceGroups
from veomni.batch.micro_batch import MicroBatch
from veomni.errors import DataError, ModelError
from veomni.models.adapter.adapter import ModelAdapter
from veomni.models.adapter.passes.shared_media import share_towers
from veomni.models.traits import SplitsRows, Trait
from veomni.models.traits.rows import dry_run
from veomni.models.transformers_api.attention import text_attention_of
from veomni.ops.attention.text import UNSPLIT_ATTENTION, use_attention
from veomni.parallel.mesh import ParallelState
from veomni.strategies.base import SetupContext, Strategy

_PACKING_BACKENDS = (
    "eager", "sdpa", "flex_attention", "varlen", "ring", "flash_attention_2", "flash_attention_3", "flash_attention_4",
)  # fmt: skip


class SequenceStrategy(Strategy):
    """A strategy that splits every row over ranks.

    Rows are cut once for all such strategies together, as the mesh says; attention is wrapped by each in turn.

    Args:
        validate_batches: Check in every micro-batch that the ranks which share a row hold the same one, for debugging
            a loader; it costs a small collective.
    """

    requires: ClassVar[tuple[type[Trait], ...]] = (SplitsRows,)

    def __init__(self, *, validate_batches: bool = False) -> None:
        self.validate_batches = validate_batches

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
            raise ModelError(
                f"attention {backend} does not support document boundaries (cu_seqlens)",
                "set attention to auto, or to one of sdpa, eager, flex_attention and flash_attention_2 to 4",
                field="build_model.attention",
            )
        if adapter.sequence is None:
            adapter.patch(model, UNSPLIT_ATTENTION, backend)
            adapter.sequence = _groups(state)
            share_towers(adapter, adapter.sequence)
        use_attention(model, self.install(model, backend, state))

    def install(self, model: nn.Module, backend: str, state: ParallelState) -> str:
        """Return the name of an attention over whole rows that runs ``backend`` inside.

        Raises:
            ModelError: the model's heads do not divide, or its attention cannot be wrapped.
        """
        raise NotImplementedError

    @override
    def verify(self, model: nn.Module, body: nn.Module, context: SetupContext) -> None:
        size = context.state.size("sequence")
        if size > 1:
            dry_run(model, body, size, context.device)


def _groups(state: ParallelState) -> SequenceGroups:
    ulysses, ring = (state.group(axis) if state.size(axis) > 1 else None for axis in ("ulysses", "cp"))
    return SequenceGroups(state.sequence_shard, state.group("sequence"), ulysses, ring)


def _check_same_rows(digest: int, state: ParallelState) -> None:
    group = state.group("sequence")
    digests = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(digests, torch.tensor([digest]), group=group)
    if len({int(found) for found in digests}) > 1:
        raise DataError(
            f"the {group.size()} ranks that share each row were given different rows",
            "give the loader launcher.data_parallel, not the rank and the size of the world",
        )
