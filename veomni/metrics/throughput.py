"""How fast a step was: where its time went, tokens per second, and the share of the devices' peak that was used."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from veomni.metrics.flops import StepFlops

_GIB = 2**30


@dataclass
class Throughput:
    """Measure the steps of a run, one after the other.

    A step's time is split at :meth:`mark`: ``mark("data")`` ends waiting for data, ``mark("compute")`` ends forward
    and backward, and what is left until :meth:`end_step` is the optimizer's, clipping included. Time marked
    "evaluation" is no part of the step. On an asynchronous device these are times of the host: kernels are charged to
    the section that waits for them.

    Attributes:
        peak_flops: Peak FLOP/s of all devices together at the format of compute; None when unknown: MFU is None then.
        peak_memory: Returns the most bytes allocated on this device so far; None when unknown.
        clock: Time in seconds.
    """

    peak_flops: float | None = None
    peak_memory: Callable[[], int] | None = None
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self.start_step()

    def start_step(self) -> None:
        """Start the clock of a step."""
        self._sections = {"data": 0.0, "compute": 0.0, "optimizer": 0.0}
        self._start = self._last = self.clock()

    def mark(self, section: str) -> None:
        """End a section: the time since the last mark is added to it."""
        now = self.clock()
        self._sections[section] = self._sections.get(section, 0.0) + now - self._last
        self._last = now

    def end_step(self, amount: int, flops: StepFlops | None, unit: str = "tokens") -> dict[str, float | int | None]:
        """Stop the clock and return the step's numbers, by the columns of ``metrics.jsonl``.

        ``amount`` (tokens without padding, or the "samples" of other data) and ``flops`` are over all ranks.
        """
        self.mark("optimizer")
        seconds = self._last - self._start - self._sections.get("evaluation", 0.0)
        return {
            unit: amount,
            f"{unit}_per_second": amount / seconds,
            "step_seconds": seconds,
            "mfu_causal": self._utilization(flops.causal, seconds) if flops else None,
            "mfu_full": self._utilization(flops.full, seconds) if flops else None,
            "peak_memory_gib": self.peak_memory() / _GIB if self.peak_memory is not None else None,
            **{f"{section}_seconds": spent for section, spent in self._sections.items()},
        }

    def _utilization(self, flops: float, seconds: float) -> float | None:
        return None if self.peak_flops is None else flops / seconds / self.peak_flops
