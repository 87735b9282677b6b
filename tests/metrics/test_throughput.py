"""The step's clock, driven by hand."""

from __future__ import annotations

import pytest

from veomni.metrics import StepFlops, Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def meter(clock: Clock, peak_flops: float | None = 4e12) -> Throughput:
    return Throughput(peak_flops=peak_flops, peak_memory=lambda: 3 * 2**29, clock=clock)


def one_step(throughput: Throughput, clock: Clock, flops: StepFlops | None) -> dict:
    throughput.start_step()
    for section, seconds in (("data", 0.5), ("compute", 1.0), ("data", 0.25), ("compute", 2.0)):
        clock.now += seconds
        throughput.mark(section)
    clock.now += 0.25
    return throughput.end_step(8000, flops)


def test_time_is_split_and_rates_are_over_all_ranks() -> None:
    clock = Clock()
    throughput = meter(clock)
    first = one_step(throughput, clock, StepFlops(causal=4e12, full=8e12))
    clock.now += 1000.0  # evaluation between the steps is no step's time
    assert one_step(throughput, clock, StepFlops(causal=4e12, full=8e12)) == first
    assert first == {
        "tokens": 8000,
        "tokens_per_second": 2000.0,
        "step_seconds": 4.0,
        "mfu_causal": 0.25,  # 1e12 FLOP/s out of 4e12
        "mfu_full": 0.5,
        "peak_memory_gib": 1.5,
        "data_seconds": 0.75,
        "compute_seconds": 3.0,
        "optimizer_seconds": 0.25,
    }


@pytest.mark.parametrize(("peak", "flops"), [(None, StepFlops(1.0, 2.0)), (4e12, None)])
def test_unknown_peak_or_flops_is_no_number(peak, flops) -> None:
    clock = Clock()
    metrics = one_step(meter(clock, peak), clock, flops)
    assert metrics["mfu_causal"] is None
    assert metrics["mfu_full"] is None
    assert metrics["tokens_per_second"] == 2000.0


def test_the_default_clock_runs() -> None:
    throughput = Throughput()
    throughput.start_step()
    assert throughput.end_step(1, None)["step_seconds"] > 0
