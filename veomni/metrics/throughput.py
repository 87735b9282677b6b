"""How fast a step was: where its time went, tokens per second, and the share of the devices' peak that was used."""

from __future__ import annotations

import time
from collections.abc import Callable

from veomni.metrics.flops import StepFlops

_GIB = 2**30


class Throughput:
    """Measure the steps of a run, one after the other.

    A step's time is split at :meth:`mark`: ``mark("data")`` ends waiting for data, ``mark("compute")`` ends forward
    and backward, and what is left until :meth:`end_step` is the optimizer's, clipping included. Time marked
    "evaluation" is no part of the step::

        throughput.start_step()
        batch = next(loader)
        throughput.mark("data")
        loss.backward()
        throughput.mark("compute")
        optimizer.step()
        metrics = throughput.end_step(tokens, counter.step_flops(lengths))

    Args:
        peak_flops: Peak FLOP/s of one device at the format of compute; None when unknown: MFU is None then.
        world_size: Devices that share the work.
        peak_memory: Returns the most bytes allocated on this device so far.
        synchronize: Waits until the device is done; called where a section ends. Without it, the sections of an
            asynchronous device are times of the host: kernels are charged to the section that happens to wait for them.
        clock: Time in seconds.
    """

    def __init__(
        self,
        *,
        peak_flops: float | None,
        world_size: int,
        peak_memory: Callable[[], int],
        synchronize: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._peak_flops = None if peak_flops is None else peak_flops * world_size
        self._peak_memory = peak_memory
        self._synchronize = synchronize
        self._clock = clock
        self._sections: dict[str, float] = {}
        self._start = self._last = clock()

    def start_step(self) -> None:
        """Start the clock of a step."""
        self._sections = {"data": 0.0, "compute": 0.0, "optimizer": 0.0}
        self._start = self._last = self._clock()

    def mark(self, section: str) -> None:
        """End a section: the time since the last mark is added to it."""
        if self._synchronize is not None:
            self._synchronize()
        now = self._clock()
        self._sections[section] = self._sections.get(section, 0.0) + now - self._last
        self._last = now

    def end_step(self, tokens: int, flops: StepFlops | None) -> dict[str, float | int | None]:
        """Stop the clock and return the step's numbers.

        Args:
            tokens: Tokens of the step over all ranks, without padding.
            flops: FLOPs of the step over all ranks; None when the model's are not known.

        Returns:
            ``tokens, tokens_per_second, step_seconds, mfu_causal, mfu_full, peak_memory_gib``, and
            ``<section>_seconds`` for ``data``, ``compute``, ``optimizer`` and any other section that was marked.
        """
        self.mark("optimizer")
        seconds = self._last - self._start - self._sections.get("evaluation", 0.0)
        return {
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "mfu_causal": self._utilization(flops.causal, seconds) if flops else None,
            "mfu_full": self._utilization(flops.full, seconds) if flops else None,
            "peak_memory_gib": self._peak_memory() / _GIB,
            **{f"{section}_seconds": spent for section, spent in self._sections.items()},
        }

    def _utilization(self, flops: float, seconds: float) -> float | None:
        return None if self._peak_flops is None else flops / seconds / self._peak_flops
