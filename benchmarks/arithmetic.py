"""The FLOPs of a row's tokens, counted by this library."""

from __future__ import annotations

from itertools import pairwise

from benchmarks.rows import build_config, micro_batch


def flops_per_token(row):
    """FLOPs of forward and backward with causal attention; 0 where the documents of a step are not known here."""
    from veomni import build_model
    from veomni.metrics.flops import FlopsCounter

    if row.chats or row.images:
        return 0.0
    counter = FlopsCounter.from_model(build_model(build_config(row), weights="random"))
    return counter.step_flops(lengths_of(row)).causal / (row.rows * row.length)


def lengths_of(row):
    if not row.packed:
        return [row.length] * row.rows
    positions = micro_batch(row, 2, 0)["position_ids"].flatten()
    ends = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    return [b - a for a, b in pairwise(ends)]
