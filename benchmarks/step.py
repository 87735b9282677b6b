"""One optimizer step of a model, through VeOmni, Accelerate and Lightning Fabric side by side in one run.

    python benchmarks/step.py --size 1.7b --rows 4 --length 4096
    python benchmarks/step.py --size 30b-a3b --layers 6 --only veomni,accelerate

Each runs in a process of its own with the same random Qwen3 weights, tokens, optimizer (fused AdamW on fp32 master
weights), clipping and bf16 compute; one optimizer step is forward, backward, clip and update. Prints the median of the
timed steps, tokens/s, peak memory and the ratio to each peer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

SIZES = {
    # hidden, intermediate, layers, heads, kv_heads, head_dim, vocab
    "tiny": (64, 128, 2, 4, 2, 16, 512),
    "0.6b": (1024, 3072, 28, 16, 8, 128, 151_936),
    "1.7b": (2048, 6144, 28, 16, 8, 128, 151_936),
}
FILES = {"30b-a3b": "qwen3_30b_a3b.json"}


def config_of(args):
    from transformers import AutoConfig, Qwen3Config

    if args.size in FILES:
        config = AutoConfig.from_pretrained(Path(__file__).parents[1] / "configs/model_configs" / FILES[args.size])
        config.num_hidden_layers = args.layers or config.num_hidden_layers
        config.use_cache = False
        return config
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocab = SIZES[args.size]
    config = Qwen3Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=args.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        tie_word_embeddings=True,
        max_position_embeddings=131_072,
        rope_theta=1e6,
    )
    config.use_cache = False
    return config


def tokens_of(args, vocab):
    import torch

    return torch.randint(0, vocab, (args.rows, args.length), generator=torch.Generator().manual_seed(0))


def timed(args, step):
    """Run ``step`` and return the median seconds of the timed calls, and the peak memory in GiB."""
    import torch

    cuda = torch.cuda.is_available()
    times = []
    for index in range(args.warmup + args.steps):
        if index == args.warmup and cuda:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    timed_steps = sorted(times[args.warmup :])
    return timed_steps[len(timed_steps) // 2], torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def run_veomni(args):
    import torch

    from veomni import Launcher, build_model
    from veomni.strategies import FSDP2, ActivationCheckpointing, Compile, Ulysses

    strategies = [FSDP2(), Ulysses(1)] if args.ulysses else [FSDP2()]
    if args.recompute != "none":
        strategies.append(ActivationCheckpointing(args.recompute))
    if not args.no_compile:
        strategies.append(Compile())
    launcher = Launcher(strategies, precision="bf16", devices=1)
    launcher.launch()
    model = launcher.setup_model(build_model(config_of(args), weights="random")).train()
    optimizer = launcher.setup_optimizer(model, torch.optim.AdamW, lr=1e-5, fused=True)
    ids = tokens_of(args, model.config.vocab_size)
    positions = torch.arange(args.length).expand_as(ids).contiguous()
    batches = launcher.track([[{"input_ids": ids, "labels": ids, "position_ids": positions}]] * 10_000)

    def step():
        batch = next(batches)
        for micro in launcher.accumulate(model, batch):
            launcher.backward(model(**micro.inputs).loss, micro)
        launcher.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return launcher.global_loss(batch)

    return timed(args, step)


def peer_model(args):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config_of(args), attn_implementation="sdpa", dtype=torch.float32)
    if args.recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def run_accelerate(args):
    import torch
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    single_process_group()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(mixed_precision="bf16", fsdp_plugin=plugin)
    model = peer_model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = tokens_of(args, model.config.vocab_size).to(accelerator.device)

    def step():
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return timed(args, step)


def run_fabric(args):
    import torch
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def parallelize(model, mesh):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["data_parallel"], mp_policy=policy)
        fully_shard(model, mesh=mesh["data_parallel"], mp_policy=policy)
        return model

    fabric = Fabric(devices=1, strategy=ModelParallelStrategy(parallelize))
    fabric.launch()
    model = fabric.setup(peer_model(args).to(fabric.device))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True))
    ids = tokens_of(args, model.config.vocab_size).to(fabric.device)

    def step():
        loss = model(input_ids=ids, labels=ids).loss
        fabric.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return timed(args, step)


def single_process_group():
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ["FSDP_VERSION"] = "2"


RUNNERS = {"veomni": run_veomni, "accelerate": run_accelerate, "fabric": run_fabric}


def compare(args):
    results = {}
    for name in args.only.split(","):
        command = [sys.executable, __file__, "--child", name, *sys.argv[1:]]
        child = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in child.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            print(f"{name}: failed\n{child.stderr[-3000:]}")
            continue
        if args.verbose:
            print(child.stderr[-2000:])
        results[name] = json.loads(lines[0].removeprefix("RESULT "))
    tokens = args.rows * args.length
    ours = results.get("veomni")
    layers = f", {args.layers} layers" if args.layers else ""
    print(f"qwen3 {args.size}{layers}, {args.rows} x {args.length} tokens a step, recompute {args.recompute}")
    for name, (seconds, gib) in results.items():
        ratio = f"veomni is {seconds / ours[0]:.2f}x" if ours and name != "veomni" else ""
        print(f"{name:11s} {seconds * 1e3:8.1f} ms  {tokens / seconds:9.0f} tokens/s  {gib:6.1f} GiB  {ratio}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, *FILES], default="1.7b")
    parser.add_argument("--layers", type=int, help="layers instead of the size's own")
    parser.add_argument("--rows", type=int, default=4, help="documents of a step, one per row")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a document")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--recompute", choices=["none", "full", "selective"], default="none")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--ulysses", action="store_true", help="give veomni Ulysses(1): what its machinery costs")
    parser.add_argument("--only", default="veomni,accelerate,fabric")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--child", choices=RUNNERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT " + json.dumps(RUNNERS[args.child](args)), flush=True)
        os._exit(0)
    compare(args)


if __name__ == "__main__":
    main()
