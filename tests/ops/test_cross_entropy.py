from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import veomni.ops.loss.cross_entropy as ops
from veomni.batch.fields import IGNORE_INDEX


def _inputs(dtype, bias):
    torch.manual_seed(3)
    hidden = torch.randn(37, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(101, 12, dtype=dtype, requires_grad=True)
    offset = torch.randn(101, dtype=dtype, requires_grad=True) if bias else None
    labels = torch.randint(0, 101, (37,))
    labels[::5] = IGNORE_INDEX
    return hidden, weight, labels, offset


@pytest.mark.parametrize("rows", [1, 7, 37, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_pytorch_for_every_chunking(monkeypatch, rows, bias):
    monkeypatch.setattr(ops, "CHUNK_ELEMENTS", rows * 101)
    hidden, weight, labels, offset = _inputs(torch.float64, bias)
    tensors = [hidden, weight] + ([offset] if bias else [])
    expected = F.cross_entropy(F.linear(hidden, weight, offset), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    truth = torch.autograd.grad(expected * 0.37, tensors)
    loss = ops.linear_cross_entropy_sum(hidden, weight, labels, offset)
    found = torch.autograd.grad(loss * 0.37, tensors)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for left, right in zip(found, truth, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


def test_second_backward_is_rejected():
    hidden, weight, labels, _ = _inputs(torch.float64, False)
    loss = ops.linear_cross_entropy_sum(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_all_labels_ignored_gives_zero_not_nan():
    hidden, weight, labels, _ = _inputs(torch.float32, False)
    loss = ops.linear_cross_entropy_sum(hidden, weight, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.abs().max() == 0.0
    assert weight.grad.abs().max() == 0.0


def test_no_gradient_is_computed_in_evaluation():
    hidden, weight, labels, _ = _inputs(torch.float32, False)
    with torch.no_grad():
        loss = ops.linear_cross_entropy_sum(hidden, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, ops.cross_entropy_sum(hidden @ weight.T, labels))


def test_autocast_computes_in_bf16_and_returns_fp32():
    hidden, weight, labels, _ = _inputs(torch.float32, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.linear_cross_entropy_sum(hidden, weight, labels)
    assert loss.dtype is torch.float32
    loss.backward()
    assert weight.grad.dtype is torch.float32
    truth = F.cross_entropy(hidden.double() @ weight.double().T, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    (reference,) = torch.autograd.grad(truth, weight)
    assert ((weight.grad - reference).norm() / reference.norm()).item() < 2e-2


def _weights(dtype, device="cpu"):
    weights = torch.rand(37, dtype=dtype, generator=torch.Generator().manual_seed(4)) * 3
    weights[3::7] = 0
    return weights.to(device)


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_weighted_sum_equals_pytorch_for_every_chunking(monkeypatch, rows, bias):
    monkeypatch.setattr(ops, "CHUNK_ELEMENTS", rows * 101)
    hidden, weight, labels, offset = _inputs(torch.float64, bias)
    tensors, weights = [hidden, weight] + ([offset] if bias else []), _weights(torch.float64)
    logits = F.linear(hidden, weight, offset)
    each = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    truth = torch.autograd.grad((each * weights).sum() * 0.37, tensors, retain_graph=True)
    losses = torch.empty(2, 37, dtype=torch.float64)
    for loss in (
        ops.linear_cross_entropy_sum(hidden, weight, labels, offset, losses[0], weights),
        ops.cross_entropy_sum(logits, labels, losses[1], weights),
    ):
        torch.testing.assert_close(loss, (each * weights).sum(), rtol=1e-13, atol=0)
        for left, right in zip(torch.autograd.grad(loss * 0.37, tensors), truth, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(losses, each.detach().expand(2, -1), rtol=1e-12, atol=0)  # without their weights


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel in question runs on CUDA")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_kernel_scales_each_token(dtype, bound, weighted):
    hidden, weight, labels, offset = _inputs(torch.float64, True)
    tensors = (hidden, weight, offset)
    weights = _weights(torch.float64) if weighted else torch.ones(37, dtype=torch.float64)
    each = F.cross_entropy(F.linear(*tensors), labels, ignore_index=IGNORE_INDEX, reduction="none")
    truth = torch.autograd.grad((each * weights).sum() * 0.37, tensors)
    ours = [tensor.detach().to("cuda", dtype).requires_grad_() for tensor in tensors]
    losses = torch.empty(37, device="cuda")
    scales = weights.float().to("cuda") if weighted else None
    loss = ops.linear_cross_entropy_sum(ours[0], ours[1], labels.to("cuda"), ours[2], losses, scales)
    found = torch.autograd.grad(loss * 0.37, ours)
    assert (losses.cpu() - each).norm() <= bound * each.norm()
    for left, right in zip((loss, *found), ((each * weights).sum(), *truth), strict=True):
        assert (left.cpu().double() - right).norm() <= bound * right.norm()
