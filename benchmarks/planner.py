"""Which samples share a row: fill and speed of the planners, beside neat packing, and how even the ranks' work is.

    python benchmarks/planner.py
    python benchmarks/planner.py --samples 20000 --repeat 1

Lengths are log-normal (median 600, sigma 1.0) and cut to a row. Neat packing is NeMo Automodel's: samples from the
longest down, each into the row with least in it if it fits there, else into a new one; written anew from that
description. Times are the processor's (the machine may be busy), and the best of several.
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from veomni.data.packing.balance import balanced_share
from veomni.data.packing.best_fit import best_fit_decreasing, epoch_bins
from veomni.data.packing.lookahead import LookAhead


def neat_packing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    values = lengths.tolist()
    rows, row_of, opened = [], [0] * len(values), 0
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = values[sample]
        if rows and rows[0][0] + length <= capacity:
            used, row = rows[0]
            heapq.heapreplace(rows, (used + length, row))
        else:
            row, opened = opened, opened + 1
            heapq.heappush(rows, (length, row))
        row_of[sample] = row
    return np.array(row_of)


@dataclass(frozen=True, slots=True)
class _Sample:
    number: int
    length: int
    media: int = 0


def look_ahead(lengths: np.ndarray, capacity: int, waiting: int) -> np.ndarray:
    ahead, row_of, row = LookAhead(capacity), np.zeros(len(lengths), np.int64), 0
    for number, length in enumerate(lengths.tolist()):
        ahead.add(_Sample(number, length))
        if len(ahead) == waiting:
            row_of[[sample.number for sample in ahead.take_row()]] = row
            row += 1
    while len(ahead):
        row_of[[sample.number for sample in ahead.take_row()]] = row
        row += 1
    return row_of


def timed(plan: Callable[[], np.ndarray], repeat: int) -> tuple[np.ndarray, float]:
    best = float("inf")
    for _ in range(repeat):
        started = time.process_time()
        rows = plan()
        best = min(best, time.process_time() - started)
    return rows, best


def fill(rows: np.ndarray, lengths: np.ndarray, capacity: int) -> float:
    used = np.bincount(rows, weights=lengths)
    assert used.max() <= capacity, "a row is overfull"
    return float(lengths.sum() / (len(used) * capacity))


def planners(samples: int, repeat: int) -> None:
    drawn = np.random.default_rng(0).lognormal(np.log(600), 1.0, samples).astype(np.int64)
    print(f"{samples} samples")
    print("| tokens of a row | planner | fill | seconds | million samples per second | times neat packing |")
    print("|---|---|---|---|---|---|")
    for capacity in (4096, 8192, 32768):
        lengths = np.clip(drawn, 1, capacity)
        plans = {
            "neat packing": lambda lengths=lengths, capacity=capacity: neat_packing(lengths, capacity),
            "best fit, all": lambda lengths=lengths, capacity=capacity: best_fit_decreasing(lengths, capacity),
            "best fit, 64 ahead": lambda lengths=lengths, capacity=capacity: look_ahead(lengths, capacity, 64),
            "best fit, 256 ahead": lambda lengths=lengths, capacity=capacity: look_ahead(lengths, capacity, 256),
        }
        beside = 0.0
        for name, plan in plans.items():
            rows, seconds = timed(plan, repeat)
            beside = beside or seconds
            print(f"| {capacity} | {name} | {100 * fill(rows, lengths, capacity):.3f} % | {seconds:.3f} | "
                  f"{samples / seconds / 1e6:.2f} | {beside / seconds:.1f} |")  # fmt: skip


def balance(samples: int) -> None:
    lengths = np.clip(np.random.default_rng(1).lognormal(np.log(600), 1.0, samples).astype(np.int64), 1, 8192)
    bins = epoch_bins(lengths, 8192, pack=True, shuffle=True, seed=0, epoch=0)
    costs = np.add.reduceat(lengths[bins.samples] ** 2, bins.offsets[:-1])
    print("\nsum of squared document lengths, 8 ranks, steps of 64 rows of 8192 tokens: the slowest rank over the mean")
    print("| rows | each micro-batch | whole step |")
    print("|---|---|---|")
    for name in ("dealt in turn", "balanced"):
        waits, steps = [], []
        for start in range(0, len(costs) - 63, 64):
            step = costs[start : start + 64]
            shares = [step[rank::8] if name == "dealt in turn" else step[balanced_share(step, rank, 8)]
                      for rank in range(8)]  # fmt: skip
            loads = np.array(shares)
            waits.append(loads.max(0).sum() / loads.mean(0).sum())
            steps.append(loads.sum(1).max() / loads.sum(1).mean())
        print(f"| {name} | {np.mean(waits):.3f} | {np.mean(steps):.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    planners(args.samples, args.repeat)
    balance(min(args.samples, 100_000))


if __name__ == "__main__":
    main()
