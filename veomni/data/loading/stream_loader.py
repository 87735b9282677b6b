"""The loader of a stream: this rank's share of every optimizer step, read from the virtual shards it needs.

Row ``g`` of a run, counted over all steps, is the next one of virtual shard ``g mod shards``, and rank r of n takes
rows r, r + n, ... So the rows depend on no layout, and where the number of ranks divides that of shards, each shard is
read by one rank. Otherwise a rank also reads, and passes over, the rows of shards that it shares with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import IterableDataset

from veomni.batch.micro_batch import MicroBatch
from veomni.data.loading.loader import LoaderSettings
from veomni.data.loading.shard_reader import ShardReader, SourceProgress, StreamPlan
from veomni.data.loading.workers import Workers
from veomni.data.packing.balance import by_cost
from veomni.data.text.samples import Row
from veomni.errors import CheckpointError
from veomni.logging import create_logger

logger = create_logger(__name__)

_COUNTED = ("samples", "tokens", "dropped", "lost")

State = dict[str, Any]
Given = tuple[Row | None, State]  # a row, and the state of its shard after it


class StreamLoader:
    """Yields, per optimizer step, this rank's list of micro-batches, until the stream ends.

    Shards may end at different times: rows of those that have are empty. A rank that does not read all shards cannot
    know when the last one ends; it goes on with empty rows and says so by :attr:`drained`, and ``Launcher.track`` ends
    the loop of all ranks together.

    Args:
        plan: What the stream is made of.
        settings: Sizes and workers.
        fingerprint: What the rows depend on, by name: a state is refused where they differ.

    Attributes:
        steps_per_epoch: None: it is known only when all has been read.
    """

    steps_per_epoch = None
    remaining_steps = None

    def __init__(self, plan: StreamPlan, settings: LoaderSettings, fingerprint: Mapping[str, Any]) -> None:
        self.plan, self._settings = plan, settings
        self._fingerprint = dict(fingerprint) | {
            "max_seq_len": plan.capacity, "global_batch_size": settings.global_batch_size, "seed": plan.seed,
            "shuffle": plan.shuffle, "packing": settings.packing, "overlong": settings.overlong,
            "stream_shards": plan.shards, "lookahead": plan.lookahead, "max_media_tokens": plan.media_capacity,
            "weigh_by": plan.weigh_by, "stopping": plan.stopping, "passes": plan.passes,
            "weights": {source.name: source.weight for source in plan.sources},
        }  # fmt: skip
        apart = math.gcd(settings.size, plan.shards)
        self._shards = list(range(settings.rank % apart, plan.shards, apart))
        if plan.shards % settings.size and settings.train:
            logger.warning_rank0(
                "data.stream_shards %s is no multiple of %s data ranks: each rank reads %s shards and passes over rows",
                plan.shards, settings.size, len(self._shards),
            )  # fmt: skip
        self._step = 0
        self._states: dict[int, State] = {}
        self._readers: dict[int, ShardReader] = {}
        self._ended: set[int] = set()

    @property
    def drained(self) -> bool:
        """Whether the shards that this rank reads have ended: what it yields from now on is empty."""
        return len(self._ended) == len(self._shards)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        settings, size = self._settings, self._settings.global_batch_size
        self._remember()
        if not settings.train:
            self._step, self._states, self._ended = 0, {}, set()
        take, mine = self._start(), set(self._shards)
        while not (self.drained and len(mine) == self.plan.shards):
            rows = []
            for number in range(size):
                shard = (self._step * size + number) % self.plan.shards
                if shard not in mine:
                    continue
                row = take(shard)
                if number % settings.size == settings.rank:
                    rows.append(row or [])
            self._step += 1  # before the yield: a state taken in the loop's body says that this step was received
            yield self._micro_batches(rows)

    def _micro_batches(self, rows: list[Row]) -> list[MicroBatch]:
        size, found = self._settings.micro_batch_size, []
        if self._settings.balance:
            rows = [rows[index] for index in by_cost([sum(sample.piece.cost for sample in row) for row in rows])]
        for start in range(0, len(rows), size):
            batch = self.plan.maker.collate(rows[start : start + size])
            names = tuple(source.name for source in self.plan.sources)
            batch = replace(batch, origin=replace(batch.origin, source_names=names))
            found.append(batch.pin_memory() if self._settings.pin_memory else batch)
        return found

    # ---------------------------------------------------------------- reading

    def _start(self) -> Callable[[int], Row | None]:
        """Return what gives the next row of a shard."""
        settings, self._readers = self._settings, {}
        workers = min(settings.num_workers, len(self._shards))
        if not workers:
            self._readers = {shard: ShardReader(self.plan, shard, self._states.get(shard)) for shard in self._shards}
            return self._take
        parts = [self._shards[number::workers] for number in range(workers)]
        streams = [
            Workers(
                _ShardRows(self.plan, part, {shard: self._states.get(shard) for shard in part}, self._step,
                           settings.global_batch_size),
                None, count=1, prefetch_factor=settings.prefetch_factor, timeout=settings.worker_timeout,
            )
            for part in parts
        ]  # fmt: skip
        stream_of = {shard: stream for part, stream in zip(parts, streams, strict=True) for shard in part}

        def take(shard: int) -> Row | None:
            row, self._states[shard] = next(stream_of[shard])
            if self._states[shard]["ended"]:
                self._ended.add(shard)
            return row

        return take

    def _take(self, shard: int) -> Row | None:
        reader = self._readers[shard]
        row = reader.next_row()
        if reader.drained:
            self._ended.add(shard)
        return row

    def _remember(self) -> None:
        self._states |= {shard: reader.state_dict() for shard, reader in self._readers.items()}

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return counters and indices, never samples: those of the shards that this rank reads."""
        self._remember()
        shards = {str(shard): state for shard, state in sorted(self._states.items())}
        return {"step": self._step, "shards": shards, "fingerprint": dict(self._fingerprint)}

    @staticmethod
    def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return one state of all ranks' states, for a checkpoint that any number of ranks resumes from."""
        shards = {shard: state for rank in states for shard, state in rank["shards"].items()}
        return {**states[0], "shards": dict(sorted(shards.items(), key=lambda item: int(item[0])))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the last step received when ``state`` was taken, also on another number of ranks.

        Raises:
            CheckpointError: the state belongs to other data, or to another order of it; names what changed.
        """
        try:
            saved, step = dict(state["fingerprint"]), int(state["step"])
            states = {int(shard): dict(kept) for shard, kept in state["shards"].items()}
            for kept in states.values():
                [SourceProgress(**progress) for progress in kept["sources"].values()]
                [int(number) for ref in kept["waiting"] for number in (*ref, kept["rows"], kept["ended"])]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the loader's state is incomplete: {error!r}", "use another checkpoint") from error
        changed = _changes(saved, self._fingerprint)
        if changed:
            problem = f"the data differs from the checkpoint's: {'; '.join(changed)}"
            raise CheckpointError(problem, "put it back as it was, or start a run of its own")
        read = step * self._settings.global_batch_size
        for shard in self._shards:
            rows = max(0, -(-(read - shard) // self.plan.shards))
            if rows and shard not in states:
                problem = f"the loader's state lacks virtual shard {shard} of {self.plan.shards}"
                raise CheckpointError(problem, "save it through the launcher, which gathers those of all ranks")
        self._step = step
        self._states = {shard: states[shard] for shard in self._shards if shard in states}
        self._readers, self._ended = {}, {shard for shard, kept in self._states.items() if kept["ended"]}

    def source_counts(self) -> dict[str, dict[str, int]]:
        """Return, by source, what this rank's shards have read: samples, their tokens, records dropped, tokens lost."""
        total: dict[str, dict[str, int]] = {}
        for state in self.state_dict()["shards"].values():
            for name, progress in state["sources"].items():
                sums = total.setdefault(name, dict.fromkeys(_COUNTED, 0))
                for key in _COUNTED:
                    sums[key] += progress[key]
        return total


class _ShardRows(IterableDataset[Given]):
    """The rows of some shards, in the order of the run; what a worker holds."""

    def __init__(
        self, plan: StreamPlan, shards: Sequence[int], states: Mapping[int, State | None], step: int, step_rows: int
    ) -> None:
        self._plan, self._shards, self._states = plan, shards, states
        self._first = step * step_rows

    def __iter__(self) -> Iterator[Given]:
        readers = {shard: ShardReader(self._plan, shard, self._states[shard]) for shard in self._shards}
        number = self._first
        while True:
            reader = readers.get(number % self._plan.shards)
            if reader is not None:
                row = reader.next_row()
                yield row, reader.state_dict()
            number += 1


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for name in {**now, **saved}:
        then, here = saved.get(name), now.get(name)
        if name == "sources" and isinstance(then, dict) and isinstance(here, dict):
            found += [_source_change(source, then.get(source), here.get(source)) for source in {**then, **here}
                      if then.get(source) != here.get(source)]  # fmt: skip
        elif then != here:
            found.append(f"{name} ({then!r} then, {here!r} now)")
    return found


def _source_change(name: str, then: Any, now: Any) -> str:
    if not isinstance(then, dict) or not isinstance(now, dict):
        return f"source {name!r} is {'new' if isinstance(now, dict) else 'gone'}"
    sizes = [f"{facts.get('files')} files of {facts.get('bytes')} bytes" for facts in (then, now)]
    verb = "has shrunk" if now.get("bytes", 0) < then.get("bytes", 0) else "has changed"
    return f"source {name!r} {verb} ({sizes[0]} then, {sizes[1]} now)"
