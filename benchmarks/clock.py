"""What every rank of every library measures of its steps: their times on the device, memory, and where a step waits."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median


class Clock:
    """Times of steps from the device's own events, so that no step waits for the host to read one."""

    def __init__(self):
        import torch

        self.cuda = torch.cuda if torch.cuda.is_available() else None
        self.marks, self.allocated = [], []

    def mark(self):
        """Record the end of a step."""
        self.allocated.append(self.cuda.memory_allocated() if self.cuda else 0)
        self.marks.append(self.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter())
        if self.cuda:
            self.marks[-1].record()

    def synchronize(self):
        if self.cuda:
            self.cuda.synchronize()

    def times(self):
        """Seconds of each step but the first."""
        return [a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in pairwise(self.marks)]


def measure(steps, warmup, count):
    """Take steps from an iterator that yields the tokens of each; return this rank's numbers of the last ``count``."""
    clock = Clock()
    for _ in range(warmup):
        next(steps)
        clock.mark()
    clock.synchronize()
    if clock.cuda:
        clock.cuda.reset_peak_memory_stats()
    begin, tokens = time.perf_counter(), 0.0
    for _ in range(count):
        tokens += next(steps)
        clock.mark()
    clock.synchronize()
    seconds = time.perf_counter() - begin
    times = clock.times()[warmup - 1 :]
    return {
        "tokens_per_second": tokens / seconds,
        "median_ms": median(times) * 1e3,
        "worst_over_median": max(times) / median(times),
        "peak_gib": clock.cuda.max_memory_allocated() / 2**30 if clock.cuda else 0.0,
        "reserved_gib": clock.cuda.memory_reserved() / 2**30 if clock.cuda else 0.0,
        "growth_mib": (clock.allocated[-1] - clock.allocated[warmup - 1]) / 2**20,
        "matmul_tflops": matmul_tflops(clock),
    }


def matmul_tflops(clock, size=8192, count=20):
    """What a square product of bf16 matrices reaches in this process, which a step's FLOP/s are compared with."""
    import torch

    if not clock.cuda:
        return 0.0
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = a @ b
    begin, end = (clock.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        torch.mm(a, b, out=out)
    end.record()
    clock.synchronize()
    return 2 * size**3 * count / begin.elapsed_time(end) / 1e9
