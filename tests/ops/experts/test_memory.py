"""What a layer of experts spread over ranks keeps and holds at once, beside the same layer that is not spread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tests.ops.experts.modules import experts
from veomni.ops.experts.exchange import EXCHANGE, ExpertExchange
from veomni.ops.experts.forward import experts_forward
from veomni.ops.experts.layout import ACTIVATION, find_activation
from veomni.testing.ranks import run_ranks

RANKS, TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2, 256, 128, 48, 8, 4
RECEIVED = RANKS * TOKENS * HIDDEN * 2  # every token has experts on every rank
NUMBERS = RANKS * TOKENS * TOP_K * (8 + 8 + 2)  # the rows of their pairs, both ways, and weights


class Bytes(NamedTuple):
    """Bytes that were allocated and not released since, and the most at once."""

    kept: int
    peak: int


@contextmanager
def allocations() -> Iterator[list[Bytes]]:
    """Yield a list that holds, at the end, what was allocated inside."""
    found: list[Bytes] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield found
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    found.append(Bytes(total, peak))


def layer(chunks: int | None) -> nn.Module:
    """All experts on this rank, or its share of them, with tokens that come in ``chunks``."""
    module = experts(
        "qwen3_moe", torch.bfloat16, hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS
    )
    setattr(module, ACTIVATION, find_activation(module))
    if chunks is not None:
        for name, parameter in list(module.named_parameters()):
            own = parameter.detach().chunk(RANKS)[dist.get_rank()].clone()
            setattr(module, name, nn.Parameter(own))
        setattr(module, EXCHANGE, ExpertExchange(dist.group.WORLD, chunks))
    return module


def costs(chunks: int | None) -> tuple[Bytes, Bytes]:
    """Of a forward and a backward; as many rows of experts on each rank, spread or not.

    The least of some: threads of a backend release a tensor a little later at times.
    """
    module, local, found = layer(chunks), EXPERTS // RANKS, []
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(TOKENS, TOP_K, dtype=torch.bfloat16, requires_grad=True)
    here = [torch.rand(TOKENS, local).argsort(1)[:, : TOP_K // RANKS] + rank * local for rank in range(RANKS)]
    index = torch.cat(here, 1)
    for _ in range(5):
        with allocations() as forward:
            output = experts_forward(module, hidden, index, weights, backend="grouped_mm")
        grad = torch.ones_like(output)
        with allocations() as backward:
            output.backward(grad)
        del output, grad
        found.append(forward + backward)
    forward, backward = (Bytes(*map(min, zip(*part, strict=True))) for part in zip(*found[1:], strict=True))
    return forward, backward


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_spread_layer_keeps_what_it_received_besides(chunks):
    ((here, here_backward),) = run_ranks(costs, 1, None)
    kept = TOKENS * (TOP_K * 2 * INTERMEDIATE + HIDDEN) * 2  # the first product, and the result
    assert kept < here.kept < 1.1 * kept
    for forward, backward in run_ranks(costs, RANKS, chunks):
        assert forward.kept < here.kept + RECEIVED + 1.5 * NUMBERS
        assert forward.peak < 1.15 * here.peak + RECEIVED
        assert backward.peak < 1.15 * here_backward.peak + RECEIVED
