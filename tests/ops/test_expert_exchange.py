"""Experts on other ranks: results, gradients, what travels when, how much, and what the host reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from veomni.ops.experts.exchange import Dispatch, ExpertExchange, exchange_experts, ranks_of_token
from veomni.ops.experts.permute import Routing
from veomni.ops.experts.shared import shared_experts_beside
from veomni.testing.ranks import run_ranks

TOKENS, HIDDEN, EXPERTS, TOP_K = 13, 6, 8, 3
OPTIONS = [
    {},
    {"chunks": 2},
    {"chunks": 5},
    {"fixed_size": True},
    {"fixed_size": True, "chunks": 4},
]


def world(rank: int, choice: str) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens, experts and weights of a rank; float64, the same whoever asks."""
    generator = torch.Generator().manual_seed(rank)
    tokens = max(0, TOKENS - 6 * rank) if choice == "uneven" else TOKENS
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    index = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K].contiguous()
    if choice == "one rank":
        index[:, 0], index[:, 1], index[:, 2] = 5, 6, 7
    if choice == "some to none":  # zaya's routers skip experts so
        index[::2, 1] = EXPERTS
    weights = torch.rand(tokens, TOP_K, generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(), index, weights.requires_grad_()


def expert_weights() -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()


def run_stack(stack: Tensor):
    """Experts that are one matrix each."""

    def run(tokens: Tensor, rows: Routing, choice: Tensor, weights: Tensor) -> Tensor:
        here = [(choice == expert).double() for expert in range(len(stack))]
        assert rows.counts.tolist() == [int(pairs.sum()) for pairs in here]
        assert len(rows.order) >= rows.offsets[-1]
        parts = [
            (pairs * weights).sum(1, keepdim=True) * torch.tanh(tokens @ matrix)
            for pairs, matrix in zip(here, stack, strict=True)
        ]
        return torch.stack(parts).sum(0)

    return run


def exchanged(choice: str, options: dict) -> dict[str, Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, index, weights = world(rank, choice)
    local = EXPERTS // size
    stack = expert_weights().detach()[rank * local : (rank + 1) * local].clone().requires_grad_()
    exchange = ExpertExchange(dist.group.WORLD, **options)
    out = exchange_experts(hidden, index, weights, local, run_stack(stack), exchange)
    (out * torch.arange(1, len(out) + 1)[:, None] * (rank + 1)).sum().backward()
    return {"out": out.detach(), "hidden": hidden.grad, "weights": weights.grad, "stack": stack.grad}


def expected(size: int, choice: str) -> list[dict[str, Tensor]]:
    """One process that holds every expert, one token at a time."""
    stack, found = expert_weights(), []
    for rank in range(size):
        hidden, index, weights = world(rank, choice)
        rows = [
            sum(
                weights[t, k] * torch.tanh(hidden[t] @ stack[index[t, k]])
                for k in range(TOP_K)
                if index[t, k] < EXPERTS
            )
            for t in range(len(hidden))
        ]
        out = torch.stack(rows) if rows else hidden * weights.sum()
        (out * torch.arange(1, len(out) + 1)[:, None] * (rank + 1)).sum().backward()
        found.append({"out": out.detach(), "hidden": hidden.grad, "weights": weights.grad})
    local = EXPERTS // size
    for rank, part in enumerate(found):
        part["stack"] = stack.grad[rank * local : (rank + 1) * local]
    return found


CASES = [
    (options, choice)
    for options in OPTIONS
    for choice in ("any", "one rank", "some to none", "uneven")
    if not (choice == "uneven" and options.get("fixed_size"))  # which needs as many tokens on all ranks
]


@pytest.mark.parametrize(("options", "choice"), CASES, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_results_and_gradients_are_those_of_one_process(size, options, choice):
    for found, truth in zip(run_ranks(exchanged, size, choice, options), expected(size, choice), strict=True):
        for name, value in truth.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


# ---------------------------------------------------------------- costs


class SentBytes(TorchDispatchMode):
    """What this rank gives to collectives, by its number type."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            assert func is torch.ops.c10d.alltoall_base_.default, func
            self.sent[args[1].dtype] += args[1].numel() * args[1].element_size()
        return func(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    """Counts the ways in which Python asks a tensor for its values."""

    READS = (Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__index__, Tensor.nonzero, Tensor.cpu)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in self.READS
        return func(*args, **(kwargs or {}))


def weighted(tokens: Tensor, rows: Routing, choice: Tensor, weights: Tensor) -> Tensor:
    """Experts that change nothing."""
    return tokens * weights.where(choice < EXPERTS // dist.get_world_size(), 0.0).sum(1, keepdim=True)


def run_exchange(hidden: Tensor, index: Tensor, weights: Tensor, exchange: ExpertExchange) -> Tensor:
    return exchange_experts(hidden, index, weights, EXPERTS // dist.get_world_size(), weighted, exchange)


def costs(options: dict) -> tuple[Counter, Counter, int]:
    hidden, index, weights = world(dist.get_rank(), "any")
    exchange = ExpertExchange(dist.group.WORLD, **options)
    with SentBytes() as forward, HostReads() as reads:
        out = run_exchange(hidden, index, weights, exchange)
    with SentBytes() as backward:
        out.sum().backward()
    return forward.sent, backward.sent, reads.count


def rows_to_ranks(size: int) -> list[Tensor]:
    """For each rank, how many of its tokens go to each: a token goes once to a rank, however many experts it has."""
    by_rank = [world(rank, "any")[1] // (EXPERTS // size) for rank in range(size)]
    return [torch.stack([(ranks == rank).any(1).sum() for rank in range(size)]) for ranks in by_rank]


@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(128, 8, 4), (8, 3, 2), (64, 6, 64)])
def test_a_token_goes_to_as_many_ranks_as_drawn_ones_do(experts, top_k, ranks):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(20_000, experts, generator=generator).argsort(1)[:, :top_k] // (experts // ranks)
    seen = torch.zeros(20_000, ranks).scatter_(1, drawn, 1.0).sum(1).mean().item()
    assert ranks_of_token(experts, top_k, ranks, fixed=False) == pytest.approx(seen, rel=1e-2)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("size", [2, 4])
def test_a_token_travels_once_to_each_rank_and_back_and_the_host_reads_once(size, chunks):
    rows = torch.stack(rows_to_ranks(size))
    for rank, (forward, backward, reads) in enumerate(run_ranks(costs, size, {"chunks": chunks})):
        sent, received = int(rows[rank].sum()), int(rows[:, rank].sum())
        assert reads == 1
        assert forward == {
            torch.int64: 2 * chunks * size * 8,  # rows, and pairs of a row and an expert, for each rank
            torch.int32: sent * TOP_K * 4,
            torch.float64: (sent * (HIDDEN + TOP_K) + received * HIDDEN) * 8,
        }
        assert backward == {torch.float64: (sent * HIDDEN + received * (HIDDEN + TOP_K)) * 8}


def sent_in_recomputation() -> Counter:
    hidden, index, weights = world(dist.get_rank(), "any")
    exchange = ExpertExchange(dist.group.WORLD)
    out = checkpoint(run_exchange, hidden, index, weights, exchange, use_reentrant=False)
    with SentBytes() as backward:
        out.sum().backward()
    return backward.sent


def test_a_recomputation_does_not_send_results_again():
    rows = torch.stack(rows_to_ranks(2))
    for rank, found in enumerate(run_ranks(sent_in_recomputation, 2)):
        sent, received = int(rows[rank].sum()), int(rows[:, rank].sum())
        assert found[torch.float64] == (2 * sent * HIDDEN + sent * TOP_K + received * (HIDDEN + TOP_K)) * 8


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_host_reads_nothing_when_every_token_goes_to_all_ranks(chunks):
    for forward, _, reads in run_ranks(costs, 2, {"chunks": chunks, "fixed_size": True}):
        assert reads == 0
        assert forward == {torch.int32: 2 * TOKENS * TOP_K * 4, torch.float64: 2 * TOKENS * (2 * HIDDEN + TOP_K) * 8}


# ---------------------------------------------------------------- what travels when


def chunks_in_flight() -> list[str]:
    """Rank 1 sends its second chunk only when rank 0 has begun to work on the first."""
    store = dist.distributed_c10d._get_default_store()
    rank, seen = dist.get_rank(), []
    launch = dist.all_to_all_single

    def held_back(output, rows, *sizes, **options):
        if rows.shape[-1] == HIDDEN:
            seen.append("send")
            if rank == 1 and seen.count("send") == 2:
                store.wait(["working"])
        return launch(output, rows, *sizes, **options)

    def run(tokens, *routed):
        seen.append("work")
        if rank == 0:
            store.set("working", "")
        return weighted(tokens, *routed)

    dist.all_to_all_single = held_back
    hidden, index, weights = world(rank, "any")
    exchange = ExpertExchange(dist.group.WORLD, chunks=2)
    out = exchange_experts(hidden, index, weights, EXPERTS // 2, run, exchange)
    seen.append("backward")
    out.sum().backward()
    return seen


def test_a_chunk_travels_while_experts_work_on_another():
    for seen in run_ranks(chunks_in_flight, 2, timeout=30):
        # dispatch 1, dispatch 2, work, return 1, work, return 2; and in the backward the same from the end
        assert seen == ["send", "send", "work", "send", "work", "send", "backward", *["send"] * 4]


class Gate(nn.Module):
    """A router that knows its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        _, index, weights = world(dist.get_rank(), "any")
        return index, weights.detach() * hidden.sum(1, keepdim=True)


class Block(nn.Module):
    """What a mixture-of-experts block does around its experts, in one of the two orders there are."""

    def __init__(self, exchange: ExpertExchange | None, shared_first: bool) -> None:
        super().__init__()
        self.experts = nn.Identity()
        self.gate = Gate()
        self.shared_experts = nn.Linear(HIDDEN, HIDDEN, bias=False).double()
        nn.init.constant_(self.shared_experts.weight, 0.25)
        self.shared_first, self.exchange = shared_first, exchange

    def forward(self, hidden: Tensor) -> Tensor:
        whole = hidden.view(1, *hidden.shape)
        early = self.shared_experts(whole) if self.shared_first else None
        index, weights = self.gate(hidden)
        routed = run_exchange(hidden, index, weights, self.exchange).view(whole.shape)
        return routed + (early if self.shared_first else self.shared_experts(whole))


def block_with_shared(shared_first: bool, ahead: bool = True) -> tuple[Block, list[str]]:
    """The block, and what happens in it: shared experts and the first rows that travel, in order."""
    block, plain, seen = Block(None, shared_first), ExpertExchange(dist.group.WORLD), []
    run = block.shared_experts.forward
    block.shared_experts.forward = lambda input: seen.append("shared") or run(input)
    dispatch = partial(Dispatch, local_experts=EXPERTS // dist.get_world_size(), exchange=plain)
    block.exchange = replace(plain, shared=shared_experts_beside(block, "experts", dispatch) if ahead else None)
    return block, seen


def with_shared(shared_first: bool, ahead: bool) -> list[tuple]:
    hidden, _, _ = world(dist.get_rank(), "any")
    block, seen = block_with_shared(shared_first, ahead)
    results = []
    for _ in range(3):
        seen.clear()
        block.zero_grad()
        hidden.grad, block.gate.calls = None, 0
        out = block(hidden)
        out.sum().backward()
        results.append((out.detach(), hidden.grad, block.shared_experts.weight.grad, len(seen), block.gate.calls))
    return results


@pytest.mark.parametrize("shared_first", [False, True])
def test_shared_experts_give_the_same_ahead_of_time(shared_first):
    plain = run_ranks(with_shared, 2, shared_first, ahead=False)
    early = run_ranks(with_shared, 2, shared_first, ahead=True)
    for rank_plain, rank_early in zip(plain, early, strict=True):
        for (*expected, _, _), (*found, shared_calls, router_calls) in zip(rank_plain, rank_early, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)  # gradients are summed in another order
            assert shared_calls == router_calls == 1


def other_choice_in_the_end() -> tuple[Tensor, Tensor]:
    """What replays a recorded choice replaces the router's: tokens that left early must not count."""
    hidden, _, _ = world(dist.get_rank(), "any")
    block, _ = block_with_shared(shared_first=True)
    block(hidden)
    block.gate.register_forward_hook(lambda module, args, answer: (answer[0].flip(0).clone(), answer[1]))
    plain, _ = block_with_shared(shared_first=True, ahead=False)
    plain.gate.register_forward_hook(lambda module, args, answer: (answer[0].flip(0).clone(), answer[1]))
    return block(hidden).detach(), plain(hidden).detach()


def test_tokens_that_left_early_for_other_experts_do_not_count():
    for found, truth in run_ranks(other_choice_in_the_end, 2):
        assert torch.equal(found, truth)


def shared_in_flight(shared_first: bool) -> None:
    """Rank 1 sends its rows only when rank 0 has begun with its shared experts."""
    store = dist.distributed_c10d._get_default_store()
    rank = dist.get_rank()
    hidden, _, _ = world(rank, "any")
    block, _ = block_with_shared(shared_first)
    if shared_first:
        block(hidden)  # it is known from the second call on
    launch = dist.all_to_all_single

    def held_back(output, rows, *sizes, **options):
        if rows.shape[-1] == HIDDEN and rank == 1:
            store.wait(["shared"])
        return launch(output, rows, *sizes, **options)

    dist.all_to_all_single = held_back
    shared = block.exchange.shared
    run = shared.run
    shared.run = lambda input: store.set("shared", "") or run(input)
    block(hidden)


@pytest.mark.parametrize("shared_first", [False, True])
def test_shared_experts_run_while_tokens_travel(shared_first):
    run_ranks(shared_in_flight, 2, shared_first, timeout=30)
