"""Each collective against the same computation on the whole sequence in one process."""

from __future__ import annotations

import gc
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from veomni.batch.forward_call import SequenceGroups
from veomni.batch.split import SequenceShard
from veomni.ops.attention.whole_rows import group_of
from veomni.ops.comm.sequence_exchange import gather_heads_scatter_seq, gather_seq_scatter_heads, gather_sequence
from veomni.testing.ranks import free_port, run_ranks


def whole(batch, seq, heads, width, seed):
    return torch.randn(batch, seq, heads, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def own(tensor, dim=1):
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def check_exchange(batch, layout):
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    full = [whole(batch, 8, heads, width, seed) for seed, (heads, width) in enumerate(layout)]
    # non-contiguous, as attention modules hand them over
    local = [own(tensor).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in full]
    got = gather_seq_scatter_heads(local, group)
    for tensor, part in zip(full, got, strict=True):
        assert torch.equal(part, tensor.chunk(size, 2)[rank])
    back = [gather_heads_scatter_seq(part, group) for part in got]
    for tensor, part in zip(local, back, strict=True):
        assert torch.equal(part, tensor)
    weights = [whole(batch, 8, *tensor.shape[2:], seed=9 + number) for number, tensor in enumerate(full)]
    sum((part * weight.chunk(size, 2)[rank]).sum() for part, weight in zip(got, weights, strict=True)).backward()
    for tensor, weight in zip(local, weights, strict=True):
        assert torch.equal(tensor.grad, own(weight))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", [[(4, 6)], [(8, 4), (4, 4), (4, 4)], [(4, 6), (4, 6), (4, 2)]])
def test_sequence_for_heads_and_back(ranks, batch, layout):
    run_ranks(check_exchange, ranks, batch, layout)


def check_way_back():
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    full, weight = whole(2, 8, 4, 3, 0), whole(2, 8, 4, 3, 1)
    local = full.chunk(size, 2)[rank].clone().requires_grad_()
    (gather_heads_scatter_seq(local, group) * own(weight)).sum().backward()
    assert torch.equal(local.grad, weight.chunk(size, 2)[rank])


def test_the_way_back_has_the_transposed_gradient():
    run_ranks(check_way_back, 2)


def check_gather():
    group, rank = dist.group.WORLD, dist.get_rank()
    full = whole(2, 6, 2, 3, 0)
    local = own(full).clone().requires_grad_()
    gathered = gather_sequence(local, group, dim=1)
    assert torch.equal(gathered, full)
    (gathered * (rank + 1)).sum().backward()
    assert torch.equal(local.grad, torch.full_like(local, 3.0)), "what every rank did with it is summed"


def test_gather():
    run_ranks(check_gather, 2)


def count_bytes():
    sent = []
    exchange = dist.all_to_all_single

    def counted(output, buffer, *args, **kwargs):
        size = dist.get_world_size()
        sent.append(buffer.numel() * buffer.element_size() * (size - 1) // size)
        return exchange(output, buffer, *args, **kwargs)

    dist.all_to_all_single = counted
    seq, heads, width, size = 32, 8, 4, dist.get_world_size()
    local = [torch.randn(1, seq // size, heads, width, requires_grad=True) for _ in range(3)]
    query, key, value = gather_seq_scatter_heads(local, dist.group.WORLD)
    gather_heads_scatter_seq(query + key + value, dist.group.WORLD).sum().backward()
    return len(sent), sum(sent), 2 * 4 * seq * heads * width * (size - 1) / size**2 * 4


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_sent_are_those_of_the_formula(ranks):
    for calls, sent, expected in run_ranks(count_bytes, ranks):
        assert calls == 4, "queries, keys and values travel together, forward and backward"
        assert sent == expected


class Exchanging(nn.Module):
    """Exchanges over the groups that it was given, as attention does."""

    def __init__(self, group):
        super().__init__()
        self.sequence_groups = SequenceGroups(SequenceShard(), group, ulysses=group)

    def forward(self, tensor):
        (exchanged,) = gather_seq_scatter_heads([tensor], group_of("ulysses", self.sequence_groups))
        return exchanged


def launched_again(ports):
    """Process groups end and begin again with the same names, other sizes and other ranks."""
    rank, found = int(os.environ["RANK"]), []
    full = whole(1, 8, 4, 3, 0)
    for port, groups in zip(ports, [[[0, 1], [2, 3]], [[0, 1, 2, 3]], [[0, 2], [1, 3]], [[0, 1, 2, 3]]], strict=True):
        os.environ["MASTER_PORT"] = str(port)
        dist.init_process_group("gloo")
        made = [(ranks, dist.new_group(ranks)) for ranks in groups]
        ranks, group = next(each for each in made if rank in each[0])
        module = Exchanging(group)
        module.compile(backend="eager")
        place, size = ranks.index(rank), len(ranks)
        part = module(full.chunk(size, 1)[place])
        found.append(part.shape == full.chunk(size, 2)[place].shape and torch.equal(part, full.chunk(size, 2)[place]))
        dist.barrier()
        del made, group, module
        gc.collect()
        dist.destroy_process_group()
    return found


def test_compiled_exchanges_are_those_of_a_later_launch():
    for found in run_ranks(launched_again, 4, [free_port() for _ in range(4)], init=False):
        assert found == [True] * 4
