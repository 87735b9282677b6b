"""Every kernel that attention may run on, against attention in float64: random documents, tails, shared heads, windows.

``GPU_TESTS_ON=cuda`` runs them on GPUs; ``cpu`` tries the tests themselves, in float32 and over gloo.
"""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import current_flash_attention_impl

from tests.gpu.devices import KIND, SECONDS, on_gpus, two_devices
from veomni.batch.split import SequenceShard
from veomni.ops.attention.block import Block, Segments, attend, attend_backward, merge_into
from veomni.ops.attention.flash_package import replace_flash_kernels
from veomni.ops.attention.ring import ring_attention
from veomni.ops.attention.row_rules import CausalRule
from veomni.ops.attention.varlen import kernels_in_use, varlen_attention
from veomni.ops.comm.sequence_exchange import gather_heads_scatter_seq, gather_seq_scatter_heads
from veomni.testing.ranks import run_ranks

DTYPE, BOUND = (torch.bfloat16, 1e-2) if KIND == "cuda" else (torch.float32, 1e-5)
SCALE = 0.11


def device() -> torch.device:
    if KIND == "cuda":
        torch.cuda.set_device(dist.get_rank() if dist.is_initialized() else 0)
    return torch.device(KIND)


def tensors(batch: int, heads: tuple[int, int], queries: int, keys: int, head_dim: int) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output, the same on every rank, rounded to DTYPE."""
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(heads[0], queries), (heads[1], keys), (heads[1], keys), (heads[0], queries)]
    made = (torch.randn(batch, *shape, head_dim, generator=generator) for shape in shapes)
    return [tensor.to(device(), DTYPE) for tensor in made]


def boundaries(batch: int, length: int, documents: int) -> Tensor:
    """Random documents in each row, with segments of no tokens at the end as a loader makes them."""
    generator = torch.Generator().manual_seed(length)
    starts = [row * length + torch.randperm(length - 1, generator=generator)[:documents] + 1 for row in range(batch)]
    rows = torch.arange(0, batch * length, length)
    ends = torch.full((3,), batch * length)
    return torch.cat([torch.cat([rows, *starts]).sort().values, ends]).to(device(), torch.int32)


def reference(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, seen: Tensor) -> list[Tensor]:
    """Output, gradients and lse in float64; ``seen`` is ``[batch, 1, q, kv]``."""
    inputs = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    wide = [inputs[0], *(part.repeat_interleave(groups, dim=1) for part in inputs[1:])]
    scores = (wide[0] @ wide[1].mT * SCALE).masked_fill(~seen, -torch.inf)
    output = scores.softmax(-1).nan_to_num() @ wide[2]
    grads = torch.autograd.grad(output, inputs, grad.double())
    return [output.detach(), *grads, scores.logsumexp(-1).detach()]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=False)]


def on_whole_rows(batch, heads, length, head_dim, documents, window, together) -> list[float]:
    """``varlen`` as a model calls it; ``together`` makes queries, keys and values views of one buffer, as Ulysses."""
    query, key, value, grad = tensors(batch, heads, length, length, head_dim)
    if together:
        parts = torch.cat([part.transpose(1, 2).flatten(2) for part in (query, key, value)], dim=-1)
        widths = [part.shape[1] * head_dim for part in (query, key, value)]
        split = parts.split(widths, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in split)
    packed = boundaries(batch, length, documents) if documents else None
    options = {"cu_seq_lens_q": packed, "max_length_q": length} if documents else {}
    seen = CausalRule(batch, length, packed, length, window).visible(*[torch.arange(length, device=device())] * 2)
    inputs = [part.detach().requires_grad_() for part in (query, key, value)]
    output, _ = varlen_attention(nn.Module(), *inputs, None, scaling=SCALE, sliding_window=window or None, **options)
    grads = torch.autograd.grad(output, inputs, grad.transpose(1, 2))
    return errors([output.transpose(1, 2), *grads], reference(query, key, value, grad, seen))


WHOLE_ROWS = {
    "one document": (1, (8, 2), 1000, 128, 0, 0, False),
    "one document, exchanged": (1, (4, 2), 1000, 128, 0, 0, True),
    "rows of one document": (2, (4, 4), 333, 64, 0, 0, False),
    "wide heads": (1, (4, 2), 500, 256, 0, 0, False),
    "packed": (1, (8, 2), 1000, 128, 7, 0, False),
    "packed, exchanged": (1, (4, 1), 1000, 128, 40, 0, True),
    "packed rows": (2, (4, 2), 333, 64, 3, 0, False),
    "window": (1, (8, 2), 777, 128, 0, 100, False),
    "packed, window": (1, (8, 2), 777, 128, 5, 100, False),
}


@on_gpus
@pytest.mark.parametrize("case", WHOLE_ROWS)
def test_whole_rows(case):
    (found,) = run_ranks(on_whole_rows, 1, *WHOLE_ROWS[case], init=False, timeout=SECONDS)
    assert max(found) <= BOUND, found


def beside_a_package(folder: str) -> tuple[str | None, list[float]]:
    sys.path.insert(0, folder)
    replace_flash_kernels(("FA4",), device())
    return current_flash_attention_impl(), on_whole_rows(*WHOLE_ROWS["packed"])


@on_gpus
def test_a_package_that_does_not_fit_is_not_used(tmp_path):
    (tmp_path / "flash_attn/cute").mkdir(parents=True)
    for module in ("flash_attn", "flash_attn/cute"):
        (tmp_path / module / "__init__.py").touch()
    ((used, found),) = run_ranks(beside_a_package, 1, str(tmp_path), init=False, timeout=SECONDS)
    assert used is None
    assert max(found) <= BOUND, found


def in_parts(heads, length, before, head_dim, packed, masked) -> tuple[list[float], set[str]]:
    """Queries over the keys before them and over their own, added up: what a ring does, on one device."""
    query, key, value, grad = tensors(1, heads, length, before + length, head_dim)
    rows, offsets = torch.arange(before + length, device=device()), None
    cuts = boundaries(1, before + length, 5) if packed else None
    seen = CausalRule(1, before + length, cuts).visible(rows[before:], rows)
    blocks = []
    for keys, causal in ((slice(before), False), (slice(before, None), True)):
        if cuts is not None:
            start, end = keys.start or 0, keys.stop or before + length
            offsets = Segments((cuts - before).clamp(min=0), cuts.clamp(start, end) - start, before + length)
        parts = query, key[:, :, keys], value[:, :, keys]
        if masked:
            blocks.append((keys, Block(*parts, SCALE, mask=seen[..., keys])))
        else:
            blocks.append((keys, Block(*parts, SCALE, causal, segments=offsets)))
    total = torch.zeros(*query.shape, device=device())
    lse = torch.full(query.shape[:3], -torch.inf, device=device())
    for _, block in blocks:
        merge_into(total, lse, *attend(block))
    output = total.to(DTYPE)
    grads = [torch.zeros_like(part, dtype=torch.float32) for part in (query, key, value)]
    for keys, block in blocks:
        for grad_part, rows_of, own in zip(
            grads, (slice(None), keys, keys), attend_backward(block, grad, output, lse), strict=True
        ):
            grad_part[:, :, rows_of] += own
    found = errors([output, *grads, lse], reference(query, key, value, grad, seen))
    return found, {block.kernel for _, block in blocks}


PARTS = {
    "cudnn": ((8, 2), 640, 320, 128, False, False),
    "flash": ((4, 2), 640, 320, 256, False, False),
    "varlen": ((8, 2), 640, 320, 128, True, False),
    "efficient": ((8, 2), 640, 328, 128, True, True),
}


@pytest.mark.parametrize("kernel", PARTS)
def test_parts_add_up(kernel):
    ((found, kernels),) = run_ranks(in_parts, 1, *PARTS[kernel], init=False, timeout=SECONDS)
    assert max(found) <= BOUND, found
    if KIND == "cuda" and "FA" not in kernels_in_use():
        assert kernels == {kernel}


def join() -> int:
    backend = "nccl" if KIND == "cuda" else "gloo"
    dist.init_process_group(backend)
    device()
    return dist.get_rank()


def split_over_ranks(kind: str, documents: int, window: int, compiled: bool) -> list[float]:
    rank, length = join(), 1024
    whole = tensors(1, (8, 2), length, length, 128)
    packed = boundaries(1, length, documents) if documents else None
    rule = CausalRule(1, length, packed, length, window)
    ring = kind == "ring"
    shard = SequenceShard(cp=2, cp_rank=rank) if ring else SequenceShard(2, rank)
    mine = shard.indices(length).to(device())
    inputs = [part[:, :, mine].contiguous().requires_grad_() for part in whole[:3]]
    function = partial(on_ring, rule) if ring else partial(over_heads, packed, window)
    output = (torch.compile(function, fullgraph=True) if compiled else function)(*inputs)
    grads = torch.autograd.grad(output, inputs, whole[3][:, :, mine])
    seen = rule.visible(*[torch.arange(length, device=device())] * 2)
    expected = [part[:, :, mine] for part in reference(*whole, seen)[:4]]
    return errors([output, *grads], expected)


def on_ring(rule: CausalRule, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ring_attention(query, key, value, rule, group=dist.group.WORLD, scale=SCALE)


def over_heads(packed: Tensor | None, window: int, *inputs: Tensor) -> Tensor:
    parts = gather_seq_scatter_heads([part.transpose(1, 2) for part in inputs], dist.group.WORLD)
    query, key, value = (part.transpose(1, 2) for part in parts)
    if KIND == "cuda":
        options = {} if packed is None else {"cu_seq_lens_q": packed, "max_length_q": query.shape[2]}
        attended, _ = varlen_attention(
            nn.Module(), query, key, value, None, scaling=SCALE, sliding_window=window or None, **options
        )
    else:
        seen = CausalRule(1, query.shape[2], packed, window=window).visible(*[torch.arange(query.shape[2])] * 2)
        attended = F.scaled_dot_product_attention(query, key, value, seen, scale=SCALE, enable_gqa=True).transpose(1, 2)
    return gather_heads_scatter_seq(attended, dist.group.WORLD).transpose(1, 2)


SPLITS = [
    ("ring", 0, 0, True), ("ring", 6, 0, False), ("ring", 6, 0, True), ("ring", 0, 100, False), ("ring", 6, 100, False),
    ("ulysses", 0, 0, True), ("ulysses", 6, 0, True), ("ulysses", 6, 100, False),
]  # fmt: skip


@two_devices
@pytest.mark.parametrize(("kind", "documents", "window", "compiled"), SPLITS)
def test_rows_on_two_devices(kind, documents, window, compiled):
    for found in run_ranks(split_over_ranks, 2, kind, documents, window, compiled, init=False, timeout=SECONDS):
        assert max(found) <= BOUND, found
