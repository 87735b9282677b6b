"""A layer's experts, forward and backward: VeOmni, transformers' grouped products and Liger's fused MoE side by side.

    python benchmarks/moe.py --tokens 16384,65536

Prints milliseconds, TFLOP/s, the share of the rate of an 8192^3 matrix product in the same process, memory kept for the
backward, and every contender's error against transformers' loop over experts in float32. Needs one NVIDIA GPU, and
liger-kernel for its row.
"""

from __future__ import annotations

import argparse
from functools import partial
from types import SimpleNamespace

import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from veomni.models.transformers_api.experts import EXPERTS_IMPLEMENTATION
from veomni.ops.experts.forward import experts_forward
from veomni.ops.experts.layout import ACTIVATION, find_activation

ROUNDS = 3


def build(args):
    config = SimpleNamespace(
        num_experts=args.experts, hidden_size=args.hidden, moe_intermediate_size=args.intermediate, hidden_act="silu",
        **{EXPERTS_IMPLEMENTATION: "eager"},
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        module = Qwen3MoeExperts(config).bfloat16()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    setattr(module, ACTIVATION, find_activation(module))
    return module


def problem(args, tokens):
    """Tokens, a choice of experts as uneven as a trained router's, its weights, and the gradient of the result."""
    torch.manual_seed(1)
    hidden = torch.randn(tokens, args.hidden, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(tokens, args.experts, device="cuda") + 0.3 * torch.randn(args.experts, device="cuda")
    weights, index = logits.softmax(-1).topk(args.top_k)
    weights = (weights / weights.sum(-1, keepdim=True)).bfloat16()
    return hidden.requires_grad_(), index, weights.requires_grad_(), torch.randn_like(hidden)


def contenders(module, args):
    found = {"veomni": partial(experts_forward, module, backend=args.backend)}
    if args.compiled:
        found["veomni compiled"] = torch.compile(found["veomni"], fullgraph=True)

    def transformers(hidden, index, weights, name="grouped_mm"):
        setattr(module.config, EXPERTS_IMPLEMENTATION, name)
        return module(hidden, index, weights)

    found["transformers"] = transformers
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        found["liger"] = lambda hidden, index, weights: LigerFusedMoEFunction.apply(
            hidden, module.gate_up_proj, module.down_proj, index.int(), weights
        )
    except ImportError:
        print("liger-kernel is not installed: no row for it")
    return found


def forward_backward(run, module, hidden, index, weights, grad):
    output = run(hidden, index, weights)
    return output, *torch.autograd.grad(output, (hidden, weights, *module.parameters()), grad)


def reference(module, hidden, index, weights, grad):
    wide = build_float32(module)
    values = hidden.detach().float().requires_grad_(), index, weights.detach().float().requires_grad_()
    return forward_backward(wide, wide, *values, grad.float())


def build_float32(module):
    with torch.device("cuda"):
        wide = Qwen3MoeExperts(module.config)
    wide.load_state_dict({name: value.float() for name, value in module.state_dict().items()})
    wide.config = SimpleNamespace(**{**vars(module.config), EXPERTS_IMPLEMENTATION: "eager"})
    return wide


def worst_error(results, truth):
    errors = [(ours.float() - exact).norm() / exact.norm() for ours, exact in zip(results, truth, strict=True)]
    return max(error.item() for error in errors)


def milliseconds(function):
    from triton.testing import do_bench

    return do_bench(function, warmup=50, rep=250, return_mode="median")


def matmul_rate():
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: left @ right) / 1e9


def kept_gib(run, hidden, index, weights):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = run(hidden, index, weights)
    return (torch.cuda.memory_allocated() - before - output.nbytes) / 2**30


def compare(module, args, tokens, rate):
    values = problem(args, tokens)
    operations = 18 * tokens * args.top_k * args.hidden * args.intermediate
    found = contenders(module, args)
    truth = reference(module, *values) if tokens <= args.check_tokens else None
    errors = {}
    for name, run in found.items():
        results = forward_backward(run, module, *values)  # compiles and tunes, too
        errors[name] = f"{worst_error(results, truth):.1e}" if truth else "-"
        del results
    del truth
    times = {name: [] for name in found}
    for _ in range(ROUNDS):  # in turns, so that clocks and heat are the same for all
        for name, run in found.items():
            times[name].append(milliseconds(lambda run=run: forward_backward(run, module, *values)))
    ours = min(times["veomni"])
    print(f"{tokens} tokens, {args.experts} experts, top {args.top_k}, {args.hidden} -> {args.intermediate}, bf16")
    for name, measured in times.items():
        best = min(measured)
        tflops, kept = operations / best / 1e9, kept_gib(found[name], *values[:3])
        print(
            f"  {name:16s} {best:7.2f} ms (to {max(measured):.2f}) {tflops:4.0f} TFLOP/s {tflops / rate:4.0%} of matmul"
            f", keeps {kept:.2f} GiB, error {errors[name]}, veomni is {best / ours:.2f}x",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="16384,65536")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--check-tokens", type=int, default=16_384, help="compare with float32 up to so many tokens")
    parser.add_argument("--compiled", action="store_true", help="also VeOmni under torch.compile")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    rate = matmul_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: matmul 8192^3 runs at {rate:.0f} TFLOP/s")
    module = build(args)
    for tokens in args.tokens.split(","):
        compare(module, args, int(tokens), rate)


if __name__ == "__main__":
    main()
