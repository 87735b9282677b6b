"""One virtual shard of a stream: its share of every source, mixed, shuffled and packed, in its own order.

Its state is counters and indices: how far it has read each source, and where the samples come from that wait for a
row. A reader restored from them, on any rank, yields the same rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from veomni.data.loading.source_cursor import SourceCursor, SourceProgress
from veomni.data.loading.stream_plan import StreamPlan
from veomni.data.packing.lookahead import LookAhead
from veomni.data.packing.order import hashed_uniform
from veomni.data.text.samples import Ref, Row, Sample
from veomni.errors import CheckpointError


class StreamShard:
    """Gives the rows of one virtual shard, from a state on (DataError: a source has changed) or from the beginning."""

    def __init__(self, plan: StreamPlan, shard: int, state: Mapping[str, Any] | None = None) -> None:
        self.plan, self.shard, state = plan, shard, state or {"sources": {}, "waiting": []}
        self._mixed = [index for index, source in enumerate(plan.sources) if source.weight > 0]
        stopping, limit = plan.mixing.stopping_strategy, None
        if stopping in ("first_exhausted", "once") or (stopping == "all_exhausted" and len(self._mixed) == 1):
            limit = plan.passes
        progress = {
            index: SourceProgress(**state["sources"].get(plan.sources[index].name, {})) for index in self._mixed
        }
        self._cursors = {index: SourceCursor(plan, shard, index, limit, start) for index, start in progress.items()}
        self._phase = hashed_uniform(np.arange(len(plan.sources)), "phase of sources", plan.order.seed, shard).tolist()
        packing = plan.packing
        self._waiting = LookAhead(packing.max_seq_len, packing.max_media_tokens, pack=packing.packs)
        self._refill([Ref(*ref) for ref in state["waiting"]])

    @property
    def exhausted(self) -> bool:
        """Whether no row is left; reads ahead to find out."""
        packing = self.plan.packing
        while len(self._waiting) < (packing.lookahead if packing.packs else 1):
            index = self._choose()
            if index is None:
                break
            for sample in self._cursors[index].take():
                self._waiting.add(sample)
        return not len(self._waiting)

    def next_row(self) -> Row | None:
        """Return the samples of the next row, or None when the shard has ended."""
        if self.exhausted:
            return None
        row = []
        for sample in self._waiting.take_row():
            completed = self.plan.samples.complete(sample)
            if completed is None:
                self._cursors[sample.ref.source].leave_out(sample)
            else:
                row.append(completed)
        return row

    def _choose(self) -> int | None:
        """Return the source that is furthest behind its share, or None when the shard ends."""
        stopping = self.plan.mixing.stopping_strategy
        if stopping == "repeat":
            return self._furthest_behind(self._mixed)
        upcoming = {index: self._cursors[index].upcoming_epoch() for index in self._mixed}
        left = [index for index, epoch in upcoming.items() if epoch is not None and epoch < self.plan.passes]
        if not left:
            return None
        chosen = self._furthest_behind(left if stopping == "once" else self._mixed)
        return None if stopping == "first_exhausted" and chosen not in left else chosen

    def _furthest_behind(self, among: Sequence[int]) -> int:
        # Shards start at different phases of the same beat: their rows together then have the shares from the start.
        by_token = self.plan.mixing.sampling == "token"
        scale = self.plan.packing.max_seq_len if by_token else 1

        def used(index: int) -> float:
            progress = self._cursors[index].progress
            amount = progress.tokens if by_token else progress.samples
            return (amount + self._phase[index] * scale) / self.plan.sources[index].weight

        return min(among, key=used)

    def state_dict(self) -> dict[str, Any]:
        """Return counters and indices."""
        ended = self.exhausted  # which reads ahead, before progress is noted
        progress = {self.plan.sources[index].name: asdict(one.progress) for index, one in self._cursors.items()}
        return {"ended": ended, "sources": progress, "waiting": [list(sample.ref) for sample in self._waiting]}

    def _refill(self, refs: Sequence[Ref]) -> None:
        found: dict[Ref, Sample] = {}
        for index in {ref.source for ref in refs} & self._cursors.keys():
            found |= self._cursors[index].read_again([ref for ref in refs if ref.source == index])
        for ref in refs:
            if ref not in found:
                name = self.plan.sources[ref.source].name if ref.source < len(self.plan.sources) else ref.source
                raise CheckpointError(f"source {name!r} has changed: a sample is gone", "restore it")
            self._waiting.add(found[ref])
