"""Attention on a ring against attention over the whole row in one process, in float64: output and every gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from veomni.batch.split import SequenceShard
from veomni.errors import LayoutError, ModelError
from veomni.ops.attention.block import Block, attend, merge_into, select_kernel
from veomni.ops.attention.ring import attend_on_ring, ring_attention
from veomni.ops.attention.row_rules import CausalRule, MaskRule
from veomni.testing.ranks import run_ranks

SEQ, HEAD_DIM = 48, 8
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 20 + [2] * 1 + [3] * 20, [0] * 33 + [1] * 15])


def causal(batch, head, query, key):
    return key <= query


def window(batch, head, query, key):
    return (key <= query) & (key > query - 5)


def restrict_to_documents(batch, head, query, key):
    return (key <= query) & (DOCUMENTS[batch, query] == DOCUMENTS[batch, key])


def window_in_documents(batch, head, query, key):
    return restrict_to_documents(batch, head, query, key) & (key > query - 5)


def both_ways(batch, head, query, key):
    return DOCUMENTS[batch, query] == DOCUMENTS[batch, key]


RULES = {
    "causal": MaskRule(causal, 2, causal=True),
    "window": MaskRule(window, 2, causal=True),
    "documents": MaskRule(restrict_to_documents, 2, causal=True),
    "documents, not known to be causal": MaskRule(restrict_to_documents, 2, causal=False),
    "both ways": MaskRule(both_ways, 2, causal=False),
    "window in documents": MaskRule(window_in_documents, 2, causal=True),
}
STARTS = (DOCUMENTS.diff(prepend=DOCUMENTS[:, :1] - 1) != 0).flatten().nonzero().flatten()
BOUNDARIES = torch.cat([STARTS, torch.tensor([2 * SEQ] * 3)]).to(torch.int32)  # a loader repeats the last one
AS_DATA = {
    "causal": CausalRule(2, SEQ),
    "window": CausalRule(2, SEQ, window=5),
    "documents": CausalRule(2, SEQ, BOUNDARIES, 33),
    "window in documents": CausalRule(2, SEQ, BOUNDARIES, 33, window=5),
}
HEADS = {"as many": (4, 4, HEAD_DIM), "grouped": (4, 2, HEAD_DIM), "one": (3, 1, HEAD_DIM), "wide values": (4, 2, 12)}


def inputs(heads: int, kv_heads: int, value_dim: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, SEQ, HEAD_DIM), (2, kv_heads, SEQ, HEAD_DIM), (2, kv_heads, SEQ, value_dim)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return tensors, torch.randn(2, heads, SEQ, value_dim, generator=generator, dtype=torch.float64)


def in_one_process(rule: MaskRule, sizes):
    tensors, upstream = inputs(*sizes)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    everywhere = torch.arange(SEQ)
    output = F.scaled_dot_product_attention(
        *tensors, attn_mask=rule.visible(everywhere, everywhere), scale=0.3, enable_gqa=True
    )
    return output, torch.autograd.grad(output, tensors, upstream)


def on_a_ring(rule, sizes, dtype):
    group = dist.group.WORLD
    part = SequenceShard(cp=group.size(), cp_rank=group.rank()).indices(SEQ)
    tensors, upstream = inputs(*sizes, dtype)
    mine = [tensor[:, :, part].contiguous().requires_grad_() for tensor in tensors]
    output = ring_attention(*mine, rule, group=group, scale=0.3)
    return output.detach(), torch.autograd.grad(output, mine, upstream[:, :, part].to(dtype))


def compare(ranks, name, sizes, dtype, bound, rules=RULES):
    expected, gradients = in_one_process(RULES[name], sizes)
    rule = rules[name]
    for rank, (output, found) in enumerate(run_ranks(on_a_ring, ranks, rule, sizes, dtype)):
        part = SequenceShard(cp=ranks, cp_rank=rank).indices(SEQ)
        for got, whole in zip((output, *found), (expected, *gradients), strict=True):
            want = whole[:, :, part].detach()
            assert got.dtype is dtype
            assert (got.double() - want).norm() <= bound * want.norm()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", RULES)
def test_every_rule(name, ranks):
    compare(ranks, name, HEADS["grouped"], torch.float64, 1e-13)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", AS_DATA)
def test_every_rule_as_data(name, ranks):
    compare(ranks, name, HEADS["grouped"], torch.float64, 1e-13, AS_DATA)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ["causal", "documents"])
def test_any_heads(name, heads):
    compare(2, name, HEADS[heads], torch.float64, 1e-13, AS_DATA)


@pytest.mark.parametrize("name", AS_DATA)
def test_half_precision_adds_up_in_float32(name):
    compare(4, name, HEADS["grouped"], torch.bfloat16, 2e-2, AS_DATA)


def test_parts_over_different_keys_add_up():
    (query, key, value), _ = inputs(4, 2, HEAD_DIM)
    whole, whole_lse = attend(Block(query, key, value, scale=0.5))
    total, lse = torch.zeros_like(whole), torch.full_like(whole_lse, -torch.inf)
    for keys in (slice(0, 5), slice(5, 6), slice(6, SEQ)):
        merge_into(total, lse, *attend(Block(query, key[:, :, keys], value[:, :, keys], scale=0.5)))
    assert torch.allclose(total, whole, rtol=1e-13, atol=1e-14)
    assert torch.allclose(lse, whole_lse, rtol=1e-13)


def test_queries_that_see_nothing_add_nothing():
    (query, key, value), _ = inputs(4, 2, HEAD_DIM)
    blind = torch.zeros(2, 1, SEQ, SEQ, dtype=torch.bool)
    output, lse = attend(Block(query, key, value, scale=0.5, mask=blind))
    assert not output.any()
    assert bool((lse == -math.inf).all())


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "value_dim", "masked", "kernel"),
    [
        ("cpu", torch.bfloat16, 64, 64, False, "math"),
        ("cuda", torch.float64, 64, 64, False, "math"),
        ("cuda", torch.bfloat16, 64, 64, False, "flash"),
        ("cuda", torch.bfloat16, 64, 128, False, "efficient"),
        ("cuda", torch.bfloat16, 64, 64, True, "efficient"),
        ("cuda", torch.float32, 64, 64, False, "efficient"),
        ("cuda", torch.bfloat16, 60, 60, False, "math"),
    ],
)
def test_which_kernel_computes_a_part(device, dtype, head_dim, value_dim, masked, kernel):
    assert select_kernel(device, dtype, head_dim, value_dim, masked=masked) == kernel


def test_uneven_chunks_are_rejected():
    odd = torch.zeros(1, 1, 3, HEAD_DIM)
    with pytest.raises(LayoutError, match="3 queries"):
        ring_attention(odd, odd, odd, RULES["causal"], group=None, scale=1.0)


@pytest.mark.parametrize(
    ("mask", "options", "named"),
    [
        (None, {}, "rule|mask"),
        (torch.ones(1), {}, "mask"),
        (RULES["causal"], {"s_aux": torch.ones(1)}, "s_aux"),
        (RULES["causal"], {"softcap": 30.0}, "softcap"),
        (RULES["causal"], {"dropout": 0.1}, "dropout"),
    ],
)
def test_what_it_does_not_support_is_rejected(mask, options, named):
    heads = torch.zeros(1, 1, 4, HEAD_DIM)
    with pytest.raises(ModelError, match=named):
        attend_on_ring(torch.nn.Module(), heads, heads, heads, mask, **options)
