"""Where the time and the memory of steps go: traces and snapshots, of planned steps and on demand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge
from torch.profiler import profile, record_function

from veomni.config.section import checked, section_of
from veomni.errors import ConfigError, DeviceError
from veomni.logging import create_logger

if TYPE_CHECKING:
    from veomni.accelerators import Accelerator
    from veomni.launch.world import World

logger = create_logger(__name__)

_HISTORY = 100_000  # allocations and frees: some steps of a large model, about 100 MB of file


class Profile:
    """Write traces of steps, and of the memory they allocate; SIGUSR2 to a rank or its supervisor requests one more.

    A trace has the operations and kernels of ``count`` steps in succession of a rank, for ui.perfetto.dev or
    chrome://tracing. The step before them warms the profiler up, where there is one; a signal is acted on after the
    step in hand. Each is a file ``<output_dir>/profile/trace_step_START-END_rank_RANK.json.gz``; nothing is slower
    outside of these steps.

    Args:
        first: First step that is profiled; null profiles on a signal only.
        count: Steps of a trace.
        every: Steps from the start of a trace to that of the next; null makes one.
        ranks: Ranks that write files; null is all of them.
        memory: Also record the latest allocations, from the first step on, and write them beside each trace, and where
            memory runs out, as memory_....pickle for https://pytorch.org/memory_viz. CUDA only.
    """

    def __init__(
        self,
        *,
        first: Annotated[int, Ge(1)] | None = None,
        count: Annotated[int, Ge(1)] = 1,
        every: Annotated[int, Ge(1)] | None = None,
        ranks: Sequence[Annotated[int, Ge(0)]] | None = None,
        memory: bool = False,
    ) -> None:
        options = {"first": first, "count": count, "every": every, "ranks": ranks, "memory": memory}
        checked(section_of(Profile), options)
        if every is not None and (first is None or every < count):
            problem = f"every {every} has no first step" if first is None else f"every {every} is less than count"
            raise ConfigError(problem, "set first, and every to count or more", "Profile.every")
        self.first, self.count, self.every, self.ranks, self.memory = first, count, every, ranks, memory
        self._directory: Path | None = None
        self._rank, self._writes = 0, False
        self._accelerator: Accelerator | None = None  # that records its allocations
        self._start: int | None = None  # first step of the trace that is due or being made
        self._step = self._finished = 0
        self._planned = False  # whether a step of the plan was reached
        self._trace: profile | None = None
        self._range: record_function | None = None

    def check(self, accelerator: Accelerator) -> None:
        """Raise a DeviceError where an accelerator cannot do what was asked for."""
        if self.memory and not accelerator.supports_memory_history:
            problem = f"the allocations of accelerator {accelerator.name} cannot be recorded"
            raise DeviceError(problem, "leave memory out, or use accelerator cuda", "Profile.memory")

    def open(self, output_dir: Path | None, world: World) -> None:
        """Take the place that files go to; a ConfigError where it is needed and there is none, or no such rank."""
        if output_dir is None and (self.first is not None or self.memory):
            raise ConfigError("there is no directory for profiles", "give Reporter an output_dir", "Profile.first")
        if beyond := [rank for rank in self.ranks or () if rank >= world.world_size]:
            problem = f"there is no rank {beyond[0]} among {world.world_size}"
            raise ConfigError(problem, f"use ranks below {world.world_size}", "Profile.ranks")
        self._directory, self._rank = None if output_dir is None else output_dir / "profile", world.rank
        self._writes = output_dir is not None and (self.ranks is None or world.rank in self.ranks)
        if self.memory and self._writes and self._accelerator is None:
            self._accelerator = world.accelerator
            world.accelerator.record_memory(_HISTORY, self._out_of_memory)

    def start_step(self, step: int) -> None:
        """Begin the step ``step``, before its data is read."""
        self._step = step
        due = next((due for due in (step, step + 1) if self._is_due(due)), None)
        self._planned = self._planned or due is not None
        if self._start is None:
            self._start = due
        elif due == step != self._start:
            logger.warning_rank0("no profile from step %s on: those from %s on are being profiled", due, self._start)
        if self._start is None or not self._writes:
            return
        if self._trace is None:
            self._trace = profile()
            self._trace.prepare_trace()  # the step before the first warms it up
        if step == self._start:
            self._trace.start_trace()
        if step >= self._start:
            self._range = record_function(f"ProfilerStep#{step}")  # the name that trace tools look for
            self._range.__enter__()

    def _is_due(self, step: int) -> bool:
        since = -1 if self.first is None else step - self.first
        return since == 0 or (since > 0 and self.every is not None and since % self.every == 0)

    def finish_step(self, *, requested: bool) -> None:
        """End the step; ``requested`` on all ranks requests a trace of the next ones, after one that warms up."""
        self._finished = self._step
        if self._start is not None:
            if requested:
                logger.info_rank0("SIGUSR2 is ignored: steps are being profiled")
            if self._step == self._start + self.count - 1:
                self._finish_trace()
            elif self._range is not None:
                self._end_range()
        elif requested and self._directory is None:
            logger.warning_rank0("SIGUSR2 is ignored: there is no directory for profiles (Reporter's output_dir)")
        elif requested:
            self._start = self._step + 2
            logger.info_rank0("SIGUSR2: profiling %s steps from step %s on", self.count, self._start)

    def close(self) -> None:
        """Write the trace in hand, which the end of a run cuts short, and record allocations no more."""
        self._finish_trace()
        if self.first is not None and self._finished and not self._planned:
            logger.warning_rank0("no step was profiled: Profile.first %s is none of this run's", self.first)
        if self._accelerator is not None:
            self._accelerator.stop_recording_memory()
            self._accelerator = None

    def _finish_trace(self) -> None:
        start, trace, self._start, self._trace = self._start, self._trace, None, None
        if trace is None or start is None:
            return
        if self._step < start:  # the run ended in the step that warms up
            trace.start_trace()
        self._end_range()
        trace.stop_trace()
        if self._finished < start:
            logger.warning_rank0("no profile from step %s on: the run ended before", start)
            return
        steps = f"{start}-{self._finished}"
        trace.export_chrome_trace(str(self._file("trace", f"step_{steps}", "json.gz")))
        self._write_memory(f"step_{steps}")
        logger.info_rank0("profiled steps %s: %s", steps, self._directory)

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _file(self, kind: str, of: str, suffix: str) -> Path:
        assert self._directory is not None
        self._directory.mkdir(parents=True, exist_ok=True)
        return self._directory / f"{kind}_{of}_rank_{self._rank}.{suffix}"

    def _write_memory(self, of: str) -> None:
        if self._accelerator is not None:
            path = self._file("memory", of, "pickle")
            self._accelerator.write_memory_history(path)
            logger.info("rank %s: allocations are in %s", self._rank, path)

    def _out_of_memory(self) -> None:
        try:
            self._write_memory("out_of_memory")
        except Exception as error:  # it would take the place of the error that is about to be raised
            logger.error("rank %s: allocations cannot be written: %s", self._rank, error)
