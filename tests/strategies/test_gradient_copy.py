"""Gradients in the buffer that FSDP2 reduces: where PyTorch's own operation puts them."""

from __future__ import annotations

import pytest
import torch

from veomni.strategies.gradient_copy import chunk_cat, copy_one_by_one

SHAPES = [(8, 3), (4,), (12, 2, 5), (4, 1)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("extra", [[], [(3, 2)], [(1,)]], ids=["even", "uneven", "fewer than ranks"])
def test_equals_pytorch(ranks, extra):
    tensors = [torch.randn(shape) for shape in SHAPES + extra]
    tensors[0] = torch.randn(3, 8).t()
    width = sum(-(-tensor.shape[0] // ranks) * (tensor.numel() // tensor.shape[0]) for tensor in tensors)
    expected, result = torch.full((ranks, width), torch.nan), torch.full((ranks, width), torch.nan)
    torch._chunk_cat(tensors, 0, ranks, out=expected)
    chunk_cat(tensors, 0, ranks, result)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_casts():
    gradient = torch.randn(6, 4).bfloat16()
    result = torch.empty(2, 12)
    chunk_cat([gradient], 0, 2, result)
    assert result.dtype is torch.float32
    assert torch.equal(result.flatten(), gradient.float().flatten())


def test_fsdp2_uses_it():
    copy_one_by_one()
    result = torch.empty(2, 2, dtype=torch.float64)
    torch.ops.fsdp.chunk_cat(
        [torch.tensor([1, 2, 3, 4])], dim=0, num_chunks=2, out=result
    )  # PyTorch's refuses integers
    assert result.tolist() == [[1, 2], [3, 4]]
