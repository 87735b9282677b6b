"""Gradients in the buffer that FSDP2 reduces: where PyTorch's own operation puts them."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from veomni.compat.sharding import copy_gradients, replace_copy_in
from veomni.testing.ranks import run_ranks

SHAPES = [(8, 3), (4,), (12, 2, 5), (4, 1)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("extra", [[], [(3, 2)], [(1,)]], ids=["even", "uneven", "fewer than ranks"])
def test_equals_pytorch(ranks, extra):
    gradients = [torch.randn(shape) for shape in SHAPES + extra]
    gradients[0] = torch.randn(3, 8).t()
    width = sum(-(-gradient.shape[0] // ranks) * (gradient.numel() // gradient.shape[0]) for gradient in gradients)
    expected, result = torch.full((ranks, width), torch.nan), torch.full((ranks * width,), torch.nan)
    torch._chunk_cat(gradients, 0, ranks, out=expected)
    copy_gradients(gradients, result, ranks)
    torch.testing.assert_close(result.view(ranks, -1), expected, rtol=0, atol=0)


def test_casts():
    gradient = torch.randn(6, 4).bfloat16()
    result = torch.empty(24)
    copy_gradients([gradient], result, 2)
    assert torch.equal(result, gradient.float().flatten())


def count_copies(calls):
    replace_copy_in(lambda *args: (calls.append(len(args[0])), copy_gradients(*args)))
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    model(torch.ones(1, 4)).sum().backward()
    return calls, model.weight.grad.to_local().tolist()


def test_fsdp2_calls_it():
    assert list(inspect.signature(_fsdp_collectives.foreach_reduce_scatter_copy_in).parameters) == list(
        inspect.signature(copy_gradients).parameters
    )
    ((calls, gradient),) = run_ranks(count_copies, 1, [])
    assert calls == [2]
    assert gradient == [[1.0] * 4] * 4
