"""Experts against transformers' own loop over experts in float64: outputs and every gradient."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.ops.experts.modules import ARCHITECTURES, EXPERTS, HIDDEN, experts
from veomni.ops.experts.forward import experts_forward, run_local_experts
from veomni.ops.experts.layout import ACTIVATION, find_activation
from veomni.ops.experts.permute import route
from veomni.strategies.transforms.blocks import checkpointed
from veomni.strategies.transforms.float64 import Float64Throughout

TOKENS, TOP_K = 37, 3
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}
BACKENDS = [
    ("loop", torch.float64, "cpu"),
    ("loop", torch.float32, "cpu"),
    ("loop", torch.bfloat16, "cpu"),
    ("grouped_mm", torch.bfloat16, "cpu"),
]
if torch.cuda.is_available():
    BACKENDS += [
        ("loop", torch.float64, "cuda"),
        ("loop", torch.float32, "cuda"),
        ("grouped_mm", torch.bfloat16, "cuda"),
        ("triton", torch.bfloat16, "cuda"),
    ]
COMPILED = [(torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.bfloat16, "cuda")]
each_backend = pytest.mark.parametrize(("backend", "dtype", "device"), BACKENDS)


def inputs(tokens=TOKENS, hidden=HIDDEN):
    """Tokens, their choice and its weights, that bfloat16 can hold; the last expert gets no token."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(tokens, hidden, generator=generator, dtype=torch.float32).bfloat16().double()
    index = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:TOP_K] for _ in range(tokens)])
    weights = torch.rand(tokens, TOP_K, generator=generator, dtype=torch.float32).bfloat16().double()
    return values, index, weights


def gradients(module, run, dtype=torch.float64, values=None, device="cpu"):
    """Run and return output and gradients of tokens, weights and every parameter by name."""
    hidden, index, weights = values or inputs()
    hidden, weights = (value.to(device, dtype, copy=True).requires_grad_() for value in (hidden, weights))
    poison(device)
    output = run(hidden, index.to(device), weights)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).bfloat16()
    output.backward(grad.to(device, dtype))
    named = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": output.detach(), "hidden": hidden.grad, "weights": weights.grad, **named}


def poison(device):
    """Fill memory that is handed out next with NaN: what no kernel writes shows."""
    if device == "cuda":
        [torch.full((2**power,), float("nan"), device=device) for power in range(6, 25) for _ in range(4)]


def truth(module, values=None):
    """What transformers computes, in float64 throughout; an expert without a token has a zero gradient."""
    module = copy.deepcopy(module).cpu().double()
    if type(module).__name__ in ("OpenAIPrivacyFilterExperts", "Inkling2Experts"):
        module.config._experts_implementation = "batched_mm"  # their own loops add up in float32
    with Float64Throughout():
        result = gradients(module, module, values=values)
    return {name: torch.zeros_like(dict(module.named_parameters())[name]) if value is None else value
            for name, value in result.items()}  # fmt: skip


def assert_close(result, expected, bound):
    for name, value in expected.items():
        assert result[name] is not None, name
        assert torch.isfinite(result[name]).all(), name
        error = (result[name].cpu().double() - value).norm() / value.norm() if value.any() else result[name].abs().max()
        assert error < bound, f"{name}: {error:.1e}"


def ours(module, backend):
    def run(hidden, index, weights):
        if hidden.dtype is not torch.float64:
            return experts_forward(module, hidden, index, weights, backend=backend)
        with Float64Throughout():
            return experts_forward(module, hidden, index, weights, backend=backend)

    return run


@each_backend
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_transformers(name, backend, dtype, device):
    module = experts(name, dtype).to(device)
    assert_close(gradients(module, ours(module, backend), dtype, device=device), truth(module), BOUNDS[dtype])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels in question run on CUDA")
@pytest.mark.parametrize("backend", ["grouped_mm", "triton"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_experts_larger_than_a_tile(name, backend):
    sizes = dict.fromkeys(("hidden_size", "moe_hidden_size"), 328)
    sizes |= dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 264)
    module = experts(name, torch.bfloat16, scale=0.05, **sizes).to("cuda")
    values = inputs(tokens=600, hidden=328)
    result = gradients(module, ours(module, backend), torch.bfloat16, values, "cuda")
    assert_close(result, truth(module, values), BOUNDS[torch.bfloat16])
    for spare in (0, 100):
        check_a_rank(module, slice(1, 3), backend, "cuda", values, spare)


def check_a_rank(whole, own, backend, device, values, spare):
    """What a rank computes that holds the experts ``own``, over as many rows as it has pairs, and ``spare`` more."""
    hidden, index, weights = values
    dtype, here = whole.down_proj.dtype, (index >= own.start) & (index < own.stop)
    expected = truth(whole, (hidden, index, weights.where(here, 0.0)))
    expected["weights"] = expected["weights"].where(here, 0.0)
    module = copy.deepcopy(whole)
    for name, parameter in whole.named_parameters():
        if len(parameter) == EXPERTS:
            setattr(module, name, nn.Parameter(parameter.detach()[own].clone()))
            expected[name] = expected[name][own]
    local = torch.where(here, index - own.start, own.stop - own.start).to(device)
    rows = route(local, own.stop - own.start).first(int(here.sum()) + spare)

    def run(hidden, index, weights):
        with Float64Throughout() if dtype is torch.float64 else nullcontext():
            return run_local_experts(module, hidden, rows, local, weights, backend)

    result = gradients(module, run, dtype, values, device)
    assert not result["weights"][~here.to(device)].any()
    assert_close(result, expected, BOUNDS[dtype])


@each_backend
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma4", "nemotron_h", "muse_spark"])
@pytest.mark.parametrize("own", [slice(1, 3), slice(EXPERTS - 1, EXPERTS)], ids=["some", "none"])
def test_pairs_of_experts_elsewhere_have_no_row(name, backend, dtype, device, own):
    whole = experts(name, dtype, scale=0.2).to(device)
    for spare in (0, 5):
        check_a_rank(whole, own, backend, device, inputs(), spare)


@each_backend
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma4"])
def test_a_choice_of_no_expert(name, backend, dtype, device):
    """zaya skips experts with the id behind the last one."""
    hidden, index, weights = inputs()
    index[::4, 1] = EXPERTS
    # Not all of transformers' loops can: the same with another expert there, and without its weight.
    there = index < EXPERTS
    kept = hidden, index.where(there, EXPERTS - 1), weights.where(there, 0.0)
    module = experts(name, dtype, scale=0.2).to(device)
    result = gradients(module, ours(module, backend), dtype, (hidden, index, weights), device)
    expected = truth(module, kept)
    expected["weights"] = expected["weights"].where(there, 0.0)
    assert_close(result, expected, BOUNDS[dtype])


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_frozen_experts_get_no_gradient(name):
    module = experts(name)
    expected = truth(module)
    module.requires_grad_(False)
    result = gradients(module, ours(module, "loop"))
    assert all(parameter.grad is None for parameter in module.parameters())
    assert_close(result, {key: expected[key] for key in ("output", "hidden", "weights")}, 1e-12)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma4"])
def test_recomputation(name):
    module = experts(name)
    run = ours(module, "loop")
    result = gradients(module, lambda *args: checkpoint(run, *args, use_reentrant=False))
    assert_close(result, truth(module), 1e-12)


class CountProducts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in ("veomni::expert_up", "veomni::expert_down")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "products"), [("none", 2), ("selective", 3), ("full", 4)])
def test_selective_recomputation_keeps_the_first_product(mode, products):
    block = nn.Module()
    block.experts = experts("qwen3_moe")
    block.forward = ours(block.experts, "loop")
    if mode != "none":
        block.forward = checkpointed(block.forward, mode)
    with CountProducts() as counted:
        result = gradients(block.experts, block)
    assert counted.count == products
    assert_close(result, truth(block.experts), 1e-12)


@pytest.mark.parametrize(("backend", "dtype", "device"), [case for case in BACKENDS if case[1:] in COMPILED])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma4", "muse_spark"])
def test_compiles_without_a_break(name, backend, dtype, device):
    module = experts(name, dtype).to(device)
    setattr(module, ACTIVATION, find_activation(module))
    torch._dynamo.reset()
    run = torch.compile(ours(module, backend), backend="aot_eager", fullgraph=True)
    assert_close(gradients(module, run, dtype, device=device), truth(module), BOUNDS[dtype])


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_autocast_decides_the_format(storage):
    module = experts("qwen3_moe", storage)
    hidden, index, weights = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = experts_forward(module, hidden.float().requires_grad_(), index, weights.float(), backend="grouped_mm")
    assert output.dtype is torch.float32
    output.sum().backward()
    assert module.down_proj.grad.dtype is storage
