"""A layer's experts, forward and backward: VeOmni, transformers' grouped products and Liger's fused MoE side by side.

    python benchmarks/moe.py --tokens 16384,65536
    python benchmarks/moe.py --tokens 16384 --ranks 4

Prints milliseconds, TFLOP/s, the share of the rate of an 8192^3 matrix product in the same process, memory kept for the
backward, and every contender's error against transformers' loop over experts in float32. Needs one NVIDIA GPU, and
liger-kernel for its row. With ``--ranks``, one of several ranks that share the experts is timed beside the layer on one
rank, without communication: packing rows, the local experts over the tokens of all ranks, and summing what is returned.
"""

from __future__ import annotations

import argparse
from functools import partial
from types import SimpleNamespace

import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from veomni.models.transformers_api.experts import EXPERTS_IMPLEMENTATION
from veomni.ops.experts.exchange import distinct_ranks
from veomni.ops.experts.forward import experts_forward, run_local_experts
from veomni.ops.experts.layout import ACTIVATION, find_activation
from veomni.ops.experts.permute import permute_tokens, route, sum_tokens

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


def as_a_rank(module, args, tokens):
    """One of ``args.ranks`` ranks: a function of its experts, the tokens and indices it receives, and their pairs."""
    local = args.experts // args.ranks
    hidden, index, weights, _ = problem(args, tokens * args.ranks)
    with torch.no_grad():
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, torch.nn.Parameter(parameter[:local].clone()))
        here = (index < local).any(1)
        hidden, index, weights = hidden[here], index[here].clamp(max=local), weights[here]
    module.num_experts = module.config.num_experts = local
    pairs = int((index < local).sum())

    def run(hidden, index, weights):
        return run_local_experts(module, hidden, route(index, local).first(pairs), index, weights, args.backend)

    values = hidden.detach().requires_grad_(), index, weights.detach().requires_grad_(), torch.randn_like(hidden)
    return run, values, pairs


def pack_and_sum(args, tokens):
    """Milliseconds of a rank's passes over the rows it sends and the sums it gets back, forward and backward."""
    hidden, index, _, grad = problem(args, tokens)
    chosen = distinct_ranks(index // (args.experts // args.ranks), args.ranks)
    routing = route(chosen, args.ranks)
    routing = routing.first(int(routing.offsets[-1]))
    print(f"  a token goes to {len(routing.order) / tokens:.2f} of {args.ranks} ranks")

    def run():
        sums = sum_tokens(permute_tokens(hidden, routing), routing)
        return torch.autograd.grad(sums, hidden, grad)

    return milliseconds(run)


def compare_with_a_rank(args, tokens, rate):
    module, here = build(args), build(args)
    values, (run, received, pairs) = problem(args, tokens), as_a_rank(here, args, tokens)
    found = {
        "one rank": (partial(experts_forward, module, backend=args.backend), module, values, tokens * args.top_k),
        f"one of {args.ranks}": (run, here, received, pairs),
    }
    inside = received[1] < here.num_experts
    outputs, *_ = forward_backward(run, here, *received)
    kept = received[0], received[1].where(inside, 0), received[2].detach().where(inside, 0.0), received[3]
    exact, *_ = reference(here, *kept)
    times = {name: [] for name in found}
    for _ in range(ROUNDS):
        for name, (call, owner, given, _) in found.items():
            times[name].append(
                milliseconds(lambda call=call, owner=owner, given=given: forward_backward(call, owner, *given))
            )
    print(f"{tokens} tokens, {args.experts} experts, top {args.top_k}, {args.hidden} -> {args.intermediate}, bf16")
    for name, (call, owner, given, rows) in found.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(call, owner, *given)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        tflops = 18 * rows * args.hidden * args.intermediate / min(times[name]) / 1e9
        print(
            f"  {name:12s} {len(given[0])} tokens, {rows} rows: {min(times[name]):.2f} ms (to {max(times[name]):.2f}) "
            f"{tflops:.0f} TFLOP/s {tflops / rate:.0%} of matmul, keeps {kept_gib(call, *given[:3]):.2f} GiB, "
            f"most at once {peak:.2f} GiB"
        )
    passes = pack_and_sum(args, tokens)
    print(f"  error of the sums {worst_error([outputs], [exact]):.1e}, packing and summing {passes:.2f} ms")


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
    parser.add_argument("--ranks", type=int, help="time one of so many ranks that share the experts")
    parser.add_argument("--compiled", action="store_true", help="also VeOmni under torch.compile")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    rate = matmul_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: matmul 8192^3 runs at {rate:.0f} TFLOP/s")
    module = build(args)
    for tokens in map(int, args.tokens.split(",")):
        if args.ranks:
            compare_with_a_rank(args, tokens, rate)
        else:
            compare(module, args, tokens, rate)


if __name__ == "__main__":
    main()
