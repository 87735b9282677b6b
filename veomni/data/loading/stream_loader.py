"""The loader of a stream: this rank's share of every optimizer step, read from the virtual shards it needs.

Row ``g`` of a run, counted over all steps, is the next one of virtual shard ``g mod shards``, and rank r of n takes
rows r, r + n, ... So the rows depend on no layout, and where the number of ranks divides that of shards, each shard is
read by one rank. Otherwise a rank also reads, and skips, the rows of shards that it shares with others.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch.utils.data import IterableDataset
from typing_extensions import override

from veomni.batch.micro_batch import MicroBatch
from veomni.data.loading.resumable import ResumableLoader
from veomni.data.loading.source_cursor import SourceProgress
from veomni.data.loading.stream_plan import StreamPlan
from veomni.data.loading.stream_shard import StreamShard
from veomni.data.loading.worker_pool import WorkerPool, received
from veomni.data.options import BatchShape, Workers
from veomni.data.packing.balance import by_cost
from veomni.data.text.samples import Row
from veomni.errors import CheckpointError, InputError
from veomni.logging import create_logger

logger = create_logger(__name__)

_COUNTED = ("samples", "tokens", "dropped", "lost")

State = dict[str, Any]
Given = tuple[Row | None, State]  # a row, and the state of its shard after it


class StreamLoader(ResumableLoader):
    """Packs samples as they are read, until the stream ends.

    Shards may end at different times: rows of those that have ended are empty. A rank that does not read all shards
    cannot detect the end of the last one: it continues with empty rows, which :attr:`exhausted` reports, and
    ``Launcher.track`` ends the loop of all ranks together.
    """

    def __init__(self, plan: StreamPlan, shape: BatchShape, workers: Workers, fingerprint: Mapping[str, Any]) -> None:
        packing, mixing, shards = plan.packing, plan.mixing, plan.order.stream_shards
        super().__init__(packing, plan.order, shape, workers, dict(fingerprint) | {
            "stream_shards": shards, "lookahead": packing.lookahead, "max_media_tokens": packing.max_media_tokens,
            **asdict(mixing), "passes": plan.passes, "weights": {source.name: source.weight for source in plan.sources},
        })  # fmt: skip
        self.plan = plan
        apart = math.gcd(shape.size, shards)
        self._shards = list(range(shape.rank % apart, shards, apart))
        if shards % shape.size and not plan.order.held_out:
            logger.warning_rank0(
                "stream_shards %s is no multiple of %s data ranks: each rank reads %s shards and skips rows", shards,
                shape.size, len(self._shards),
            )  # fmt: skip
        self._states: dict[int, State] = {}

    @property
    @override
    def exhausted(self) -> bool:
        return all(shard in self._states and self._states[shard]["ended"] for shard in self._shards)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        shape, shards, rank = self.shape, self.order.stream_shards, self.shape.rank
        if self.order.held_out:
            self._step, self._states = 0, {}
        rows_of, every = self._start(), len(self._shards) == shards
        while not (every and self.exhausted):
            rows = []
            first = self._step * shape.global_batch_size
            for number in range(first, first + shape.global_batch_size):
                shard = number % shards
                if shard in rows_of:
                    row, self._states[shard] = next(rows_of[shard])
                    rows += [row or []] if (number - first) % shape.size == rank else []
            self._step += 1  # before the yield: a state taken in the loop's body counts this step as received
            yield self._micro_batches(rows)

    def _micro_batches(self, rows: list[Row]) -> list[MicroBatch]:
        size, found = self.shape.micro_batch_size, []
        names = tuple(source.name for source in self.plan.sources)
        if self.shape.balance:
            rows = [rows[index] for index in by_cost([sum(sample.cost for sample in row) for row in rows])]
        for start in range(0, len(rows), size):
            batch = self.plan.samples.collate(rows[start : start + size])
            found.append(self._pinned(replace(batch, origin=replace(batch.origin, source_names=names))))
        return found

    def _start(self) -> dict[int, Iterator[Given]]:
        """Return, by shard, what yields its rows; several shards share an iterator, in the order of the run."""
        first, one = self._step * self.shape.global_batch_size, replace(self.workers, count=1)
        processes = max(1, min(self.workers.count, len(self._shards)))
        found: dict[int, Iterator[Given]] = {}
        for part in (self._shards[number::processes] for number in range(processes)):
            rows = _ShardRows(self.plan, {shard: self._states.get(shard) for shard in part}, first)
            found |= dict.fromkeys(part, WorkerPool(rows, None, one) if self.workers.count else map(received, rows))
        return found

    @override
    def _progress(self) -> dict[str, Any]:
        return {"shards": {str(shard): state for shard, state in sorted(self._states.items())}}

    @staticmethod
    @override
    def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        shards = {shard: state for rank in states for shard, state in rank["shards"].items()}
        return {**states[0], "shards": dict(sorted(shards.items(), key=lambda item: int(item[0])))}

    @override
    def _restore(self, step: int, state: Mapping[str, Any]) -> None:
        states = {int(shard): dict(kept) for shard, kept in state["shards"].items()}
        for kept in states.values():
            [SourceProgress(**progress) for progress in kept["sources"].values()]
            [int(number) for ref in kept["waiting"] for number in (*ref, kept["ended"])]
        for shard in self._shards:
            if step * self.shape.global_batch_size > shard and shard not in states:
                problem = f"the loader's state lacks virtual shard {shard} of {self.order.stream_shards}"
                raise CheckpointError(problem, "save it through the launcher, which gathers those of all ranks")
        super()._restore(step, state)
        self._states = {shard: states[shard] for shard in self._shards if shard in states}

    def source_counts(self) -> dict[str, dict[str, int]]:
        """Return, by source, what this rank's shards have read: samples, their tokens, records dropped, tokens lost."""
        total: dict[str, Counter[str]] = {}
        for state in self._states.values():
            for name, progress in state["sources"].items():
                total.setdefault(name, Counter()).update({key: progress[key] for key in _COUNTED})
        return {name: dict(counts) for name, counts in total.items()}


class _ShardRows(IterableDataset[Given]):
    """The rows of some shards, in the order of the run; what a worker holds."""

    def __init__(self, plan: StreamPlan, states: Mapping[int, State | None], first: int) -> None:
        self._plan, self._states, self._first = plan, states, first

    def __iter__(self) -> Iterator[Any]:
        try:
            readers = {shard: StreamShard(self._plan, shard, state) for shard, state in self._states.items()}
            for number in itertools.count(self._first):
                if reader := readers.get(number % self._plan.order.stream_shards):
                    yield reader.next_row(), reader.state_dict()
        except InputError as error:
            yield error
