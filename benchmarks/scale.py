"""Training steps on one to eight GPUs of a host: tokens/s and memory of each row of the table in docs/performance.md.

    python benchmarks/scale.py --rows dense --gpus 4
    python benchmarks/scale.py --rows dense,moe8_ep,ulysses --gpus 4 --profile --json scale.jsonl

Each row runs in process groups of its own, with random weights and tokens: forward, backward, clipping and fused AdamW
over fp32 master weights, bf16 compute, fp32 reduction. Printed per GPU: tokens/s over all timed steps, the median step,
the slowest step relative to it, the peak and the reserved memory of the worst rank, and by how much the memory that is
allocated before a step grows from the first timed step to the last. ``--profile`` adds where the device waits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

MODELS = Path(__file__).parents[1] / "configs/model_configs"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model: A file of configs/model_configs.
        length: Tokens of a row; ``rows`` of them a step and data rank.
        layers: Layers instead of the model's own.
        experts, ulysses, ring: Ranks of each axis; 0 leaves the axis out, -1 is the number of GPUs.
        recompute: Activation checkpointing.
        packed: Rows hold documents of log-normal lengths with this median.
        reduce: Format that gradients are summed in.
        prefetch, offload: Options of FSDP2.
        inputs_offloaded: Inputs of recomputed blocks wait in host memory.
        tile: Tokens of a tile of the MLP; 0 does not tile it.
    """

    model: str
    rows: int
    length: int
    layers: int | None = None
    experts: int = 0
    ulysses: int = 0
    ring: int = 0
    overlap: bool = False
    recompute: str = "none"
    packed: int = 0
    attention: str = "auto"
    reduce: str = "fp32"
    prefetch: int = 0
    offload: bool = False
    inputs_offloaded: bool = False
    tile: int = 0


def long(model, length, **options):
    """A row of everything that makes room for it."""
    return Row(model, 1, length, recompute="full", inputs_offloaded=True, **{"tile": 8192, **options})


ROWS = {
    "tiny": Row("tiny_qwen3", 2, 64),
    "tiny_ulysses": Row("tiny_qwen3", 1, 128, ulysses=2, recompute="full"),
    "tiny_ring": Row("tiny_qwen3", 1, 128, ring=2, recompute="full", packed=20),
    "tiny_moe_ep": Row("tiny_qwen3_moe", 2, 64, experts=-1),
    "dense": Row("qwen3_1.7b", 4, 4096),
    "dense_reduce_bf16": Row("qwen3_1.7b", 4, 4096, reduce="bf16"),
    "dense_prefetch1": Row("qwen3_1.7b", 4, 4096, prefetch=1),
    "dense_prefetch2": Row("qwen3_1.7b", 4, 4096, prefetch=2),
    "dense_offload": Row("qwen3_1.7b", 4, 4096, offload=True),
    "dense_packed": Row("qwen3_1.7b", 4, 4096, packed=600),
    "dense_8b": Row("qwen3_8b", 2, 4096, recompute="full"),
    "dense_8b_selective": Row("qwen3_8b", 2, 4096, recompute="selective"),
    "moe2": Row("qwen3_30b_a3b", 4, 4096, layers=2),
    "moe2_ep": Row("qwen3_30b_a3b", 4, 4096, layers=2, experts=-1),
    "moe8": Row("qwen3_30b_a3b", 4, 4096, layers=8),
    "moe8_ep": Row("qwen3_30b_a3b", 4, 4096, layers=8, experts=-1),
    "moe8_ep_prefetch2": Row("qwen3_30b_a3b", 4, 4096, layers=8, experts=-1, prefetch=2),
    "moe12_ep": Row("qwen3_30b_a3b", 4, 4096, layers=12, experts=-1),
    "ulysses": Row("qwen3_1.7b", 1, 131_072, ulysses=-1, recompute="full"),
    "ulysses_overlap": Row("qwen3_1.7b", 1, 131_072, ulysses=-1, overlap=True, recompute="full"),
    "ring": Row("qwen3_1.7b", 1, 131_072, ring=-1, recompute="full"),
    "ring2_ulysses": Row("qwen3_1.7b", 1, 131_072, ring=2, ulysses=2, recompute="full"),
    "ulysses_packed": Row("qwen3_1.7b", 1, 131_072, ulysses=-1, recompute="full", packed=4000),
    "ring_packed": Row("qwen3_1.7b", 1, 131_072, ring=-1, recompute="full", packed=4000),
    "ulysses_4b_64k": Row("qwen3_4b", 1, 65_536, ulysses=-1, recompute="full"),
    "ulysses_4b_128k": Row("qwen3_4b", 1, 131_072, ulysses=-1, recompute="full"),
    "tiny_long": long("tiny_qwen3", 4096, tile=512),
    "tiny_long_ulysses": long("tiny_qwen3", 4096, ulysses=-1, tile=512),
    "long_1gpu_131k_full": Row("qwen3_1.7b", 1, 131_072, recompute="full"),
    "long_1gpu_131k_offload": long("qwen3_1.7b", 131_072, tile=0),
    "long_1gpu_131k": long("qwen3_1.7b", 131_072),
    "long_1gpu_262k": long("qwen3_1.7b", 262_144),
    "long_1gpu_512k": long("qwen3_1.7b", 524_288),
    "long_1gpu_131k_2layers": long("qwen3_1.7b", 131_072, layers=2),
    "long_1gpu_512k_4layers": long("qwen3_1.7b", 524_288, layers=4),
    "long_1gpu_768k_4layers": long("qwen3_1.7b", 786_432, layers=4),
    "long_4b_64k": long("qwen3_4b", 65_536, ulysses=-1),
    "long_4b_128k": long("qwen3_4b", 131_072, ulysses=-1),
    "long_4b_256k": long("qwen3_4b", 262_144, ulysses=-1),
    "long_8b_512k": long("qwen3_8b", 524_288, ulysses=-1),
    "long_8b_512k_8layers": long("qwen3_8b", 524_288, ulysses=-1, layers=8),
    "long_8b_2m_4layers": long("qwen3_8b", 2_097_152, ulysses=-1, layers=4),
    "long_32k": Row("qwen3_1.7b", 1, 32_768, recompute="full"),
}


def build_config(row):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(MODELS / f"{row.model}.json")
    config.num_hidden_layers = row.layers or config.num_hidden_layers
    config.max_position_embeddings = max(row.length, config.max_position_embeddings)
    config.use_cache = False
    return config


def strategies_of(row, gpus):
    from veomni.strategies import (
        FSDP2,
        ActivationCheckpointing,
        Compile,
        ContextParallel,
        ExpertParallel,
        TiledMLP,
        Ulysses,
    )

    def ranks(size):
        return gpus if size == -1 else size

    chosen = [FSDP2(prefetch=row.prefetch, cpu_offload=row.offload)]
    if row.experts:
        chosen.append(ExpertParallel(ranks(row.experts)))
    if row.ring:
        chosen.append(ContextParallel(ranks(row.ring)))
    if row.ulysses:
        chosen.append(Ulysses(ranks(row.ulysses), overlap=row.overlap))
    if row.recompute != "none":
        chosen.append(ActivationCheckpointing(row.recompute, offload=row.inputs_offloaded))
    if row.tile:
        chosen.append(TiledMLP(row.tile))
    return [*chosen, Compile()]


def predicted_peak(row, gpus):
    """GiB at the peak of a step by the arithmetic of ``veomni plan``; None for a model that it does not count."""
    from veomni.cli.memory import RowMemory
    from veomni.errors import ConfigError
    from veomni.metrics.activation_memory import Rung
    from veomni.models import build_model
    from veomni.run_config.train import TrainSection

    sizes = {"ulysses": row.ulysses, "context": row.ring, "expert": row.experts}
    ranks = {f"{axis}_parallel_size": gpus if size == -1 else max(size, 1) for axis, size in sizes.items()}
    options = {"cpu_offload": row.offload, "prefetch": row.prefetch}
    train = TrainSection(global_batch_size=gpus, output_dir="output", precision="bf16", strategy=options, **ranks)
    try:
        memory = RowMemory(build_model(build_config(row), weights="random"), train, gpus)
    except ConfigError:
        return None
    rung = Rung(row.recompute, row.inputs_offloaded, row.tile or None)
    return memory.peak(row.rows * row.length // train.ranks_per_row, rung) / 2**30


def document_lengths(total, typical, generator):
    """Lengths of documents that fill ``total`` tokens: log-normal with median ``typical`` and sigma 1."""
    import torch

    lengths = []
    while sum(lengths) < total:
        drawn = int(math.exp(math.log(typical) + float(torch.randn((), generator=generator))))
        lengths.append(min(max(drawn, 8), total - sum(lengths)))
    return lengths


def micro_batch(row, vocabulary, seed):
    """Random rows; the positions of a packed row start again with each document."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (row.rows, row.length), generator=generator)
    if not row.packed:
        positions = torch.arange(row.length).expand_as(ids).contiguous()
        return {"input_ids": ids, "labels": ids, "position_ids": positions}
    lengths = document_lengths(ids.numel(), row.packed, generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {"input_ids": ids.view(1, -1), "labels": ids.view(1, -1), "position_ids": positions.view(1, -1)}


def measure(row, args):
    """Train, and return what this rank measured."""
    import torch

    from veomni import Launcher, build_model
    from veomni.compat.dry_runs import graph_breaks
    from veomni.strategies.transforms.precision import select_precision

    cuda = torch.cuda.is_available()
    precision = select_precision("bf16", reduce=row.reduce)
    launcher = Launcher(strategies_of(row, args.gpus), precision=precision, devices=args.gpus)
    launcher.launch()
    model = launcher.setup_model(build_model(build_config(row), weights="random", attention=row.attention)).train()
    optimizer = launcher.setup_optimizer(model, torch.optim.AdamW, lr=1e-5, fused=True)
    seeds = launcher.data_parallel.rank * 1000
    batches = [[micro_batch(row, model.config.vocab_size, seeds + index)] for index in range(4)]

    marks, allocated = [], []
    begin = time.perf_counter()
    for step in launcher.track(batches[index % 4] for index in range(100_000)):
        allocated.append(torch.cuda.memory_allocated() if cuda else 0)
        for micro in launcher.accumulate(model, step):
            launcher.backward(model(**micro.inputs).loss, micro)
        launcher.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()
        if step.index == args.warmup:
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
        if step.index >= args.warmup + args.steps:
            break
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    timed = marks[args.warmup - 1 :]
    times = [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in pairwise(timed)]
    tokens = row.rows * row.length * launcher.data_parallel.size / launcher.world_size
    result = {
        "tokens_per_second": tokens * args.steps / seconds,
        "median_ms": median(times) * 1e3,
        "worst_over_median": max(times) / median(times),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "predicted_gib": predicted_peak(row, args.gpus) or 0.0,
        "reserved_gib": torch.cuda.memory_reserved() / 2**30 if cuda else 0.0,
        "growth_mib": (allocated[-1] - allocated[args.warmup]) / 2**20,
        "graph_breaks": float(graph_breaks()),
    }
    if args.profile:
        result |= profile(launcher, model, optimizer, batches)
    return launcher.rank, result


def profile(launcher, model, optimizer, batches, steps=3):
    """Profile further steps; return how long the device waits, and for how long only collectives run, per step."""
    import torch
    from torch.profiler import ProfilerActivity, record_function

    profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])
    endless = launcher.track(batches[index % len(batches)] for index in range(100_000))
    for number in range(2 + steps):
        if number == 2:  # the first step of a loop is set-up, and Python's garbage is collected behind it
            torch.cuda.synchronize()
            profiler.start()
        with record_function("track"):
            step = next(endless)
        for micro in launcher.accumulate(model, step):
            launcher.backward(model(**micro.inputs).loss, micro)
        launcher.clip_grad_norm(model, 1.0)
        optimizer.step()
        with record_function("zero_grad"):
            optimizer.zero_grad()
    torch.cuda.synchronize()
    profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace = file.read_text()
    if os.environ.get("SCALE_TRACE") and launcher.is_rank_zero:
        Path(os.environ["SCALE_TRACE"]).write_text(trace)
    return device_time(json.loads(trace)["traceEvents"], steps)


def device_time(events, steps):
    """Milliseconds per step in which the device waits, and in which it only runs collectives, of a Chrome trace."""
    busy = {"kernel", "gpu_memcpy", "gpu_memset"}
    spans = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") in busy)
    compute = merge((a, b) for a, b, name in spans if not name.startswith("nccl"))
    everything = merge((a, b) for a, b, _ in spans)
    gaps = [(b[0] - a[1]) / 1e3 for a, b in pairwise(everything)]
    kernels = {}
    for a, b, name in spans:
        kernels[name[:90]] = kernels.get(name[:90], 0.0) + (b - a) / 1e3 / steps
    exposed = sum(b - a for a, b in everything) - sum(b - a for a, b in compute)
    largest = sorted(pairwise(everything), key=lambda pair: pair[0][1] - pair[1][0])[:8]
    return {
        "gaps_ms": sum(gaps) / steps,
        "gaps_over_50us_ms": sum(gap for gap in gaps if gap > 0.05) / steps,
        "gaps_over_50us": sum(gap > 0.05 for gap in gaps) / steps,
        "largest_gaps": [describe_gap(events, before[1], after[0]) for before, after in largest],
        "exposed_collectives_ms": exposed / 1e3 / steps,
        "compute_ms": sum(b - a for a, b in compute) / 1e3 / steps,
        "kernels_ms": dict(sorted(kernels.items(), key=lambda item: -item[1])[:25]),
    }


def describe_gap(events, begin, end):
    """What stands around a time in which the device has nothing to run, and what the host does in it.

    The kernel after it was launched "late" after the gap began, under some operations, outermost first; 0.00 is a
    kernel that was queued in time, and waited for another stream or rank.
    """
    timed = [e for e in events if "dur" in e and "ts" in e]
    device = [e for e in timed if e.get("cat") in {"kernel", "gpu_memcpy", "gpu_memset"}]
    before = max((e for e in device if e["ts"] + e["dur"] <= begin + 1e-3), key=lambda e: e["ts"] + e["dur"])
    after = min((e for e in device if e["ts"] >= end - 1e-3), key=lambda e: e["ts"])
    calls = [e for e in timed if e.get("cat") in {"cuda_runtime", "cuda_driver"}]
    own = after["args"].get("correlation")
    launch = next((e for e in calls if e["args"].get("correlation") == own), None)
    waits = [e for e in calls if "ynchronize" in e["name"] and e["ts"] < end and e["ts"] + e["dur"] > begin]
    under = []
    if launch is not None:
        spans = (e for e in timed if e.get("cat") in {"cpu_op", "user_annotation"} and e["tid"] == launch["tid"])
        under = sorted((e for e in spans if e["ts"] <= launch["ts"] <= e["ts"] + e["dur"]), key=lambda e: e["ts"])
    return {
        "ms": round((end - begin) / 1e3, 2),
        "before": before["name"][:60],
        "after": after["name"][:60],
        "late_ms": 0.0 if launch is None else round(max(0.0, launch["ts"] - begin) / 1e3, 2),
        "under": [e["name"][:40] for e in under],
        "host_waits": sorted({e["name"] for e in waits}),
    }


def merge(spans):
    """The union of sorted intervals."""
    merged = []
    for begin, end in spans:
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return merged


def child(args):
    """Run one row on all ranks; each leaves its numbers in a file."""
    rank, result = measure(ROWS[args.child], args)
    (Path(os.environ["SCALE_OUT"]) / f"{rank}.json").write_text(json.dumps(result))
    os._exit(0)


def run_row(name, args):
    """Run a row in processes of its own and return the worst of all ranks."""
    options = ["--gpus", args.gpus, "--steps", args.steps, "--warmup", args.warmup, *["--profile"] * args.profile]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", name, *map(str, options)]
        environment = {**os.environ, "SCALE_OUT": folder}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=args.timeout)
            output = done.stdout + done.stderr
        except subprocess.TimeoutExpired as expired:
            output = f"no end within {args.timeout} s\n{(expired.stderr or b'').decode()}"
        ranks = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    if len(ranks) < args.gpus:
        return {"failed": output[-2500:]}
    worst = {key: max(rank[key] for rank in ranks) for key in ranks[0] if isinstance(ranks[0][key], float)}
    worst["tokens_per_second"] = min(rank["tokens_per_second"] for rank in ranks)
    return ranks[0] | worst


def report(name, result):
    """Print one line of the table, and where the device waits if it was profiled."""
    if "failed" in result:
        print(f"{name:24s} FAILED\n{result['failed']}", flush=True)
        return
    print(
        f"{name:24s} {result['tokens_per_second']:9,.0f} tokens/s  {result['median_ms']:8.1f} ms  "
        f"slowest {result['worst_over_median']:4.2f}x  peak {result['peak_gib']:5.1f} GiB  "
        f"predicted {result['predicted_gib']:5.1f} GiB  "
        f"reserved {result['reserved_gib']:5.1f} GiB  growth {result['growth_mib']:+.1f} MiB  "
        f"graph breaks {result['graph_breaks']:.0f}",
        flush=True,
    )
    if "gaps_ms" in result:
        exposed, gaps = result["exposed_collectives_ms"], result["gaps_ms"]
        print(f"{'':24s} compute {result['compute_ms']:.1f} ms, collectives alone {exposed:.1f}, gaps {gaps:.1f}")
        count, long = result["gaps_over_50us"], result["gaps_over_50us_ms"]
        print(f"{'':24s} {count:.0f} gaps over 50 us, {long:.1f} ms; the largest of all profiled steps:")
        for gap in result["largest_gaps"]:
            around = f"{gap['before']} | {gap['after']}, launched {gap['late_ms']:.2f} ms after it began"
            under, waits = " > ".join(gap["under"]), ", ".join(gap["host_waits"])
            line = f"{gap['ms']:5.2f} ms: {around}{under and f', in {under}'}{waits and f'; {waits}'}"
            print(f"{'':20s} {line}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="dense", help=f"comma-separated: {', '.join(ROWS)}")
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds for a row, compilation included")
    parser.add_argument("--profile", action="store_true", help="profile three further steps")
    parser.add_argument("--json", type=Path, help="also append the results to this file, one line a row")
    parser.add_argument("--child", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
    for name in args.rows.split(","):
        result = run_row(name, args)
        report(name, result)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps({"row": name, "gpus": args.gpus, **asdict(ROWS[name]), **result}) + "\n")


if __name__ == "__main__":
    main()
