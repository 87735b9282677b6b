"""Training steps on one to eight GPUs of a host, this library's and its peers': tokens/s and memory of each row.

    python benchmarks/scale.py --rows dense --gpus 4
    python benchmarks/scale.py --rows dense,moe8_ep --gpus 4 --peers torchtitan,accelerate --json out.jsonl
    python benchmarks/scale.py --rows dense,moe8_ep,ulysses --gpus 4 --profile --timelines out --json out.jsonl

Each row of each library runs in separate processes (torchrun), one after the other, with random weights and
tokens: forward, backward, clipping and fused AdamW over fp32 master weights, bf16 compute, fp32 reduction. Printed per
GPU: tokens/s over all timed steps, the median step, the slowest step relative to it, the peak and the reserved memory
of the worst rank, by how much the memory that is allocated before a step grows from the first timed step to the last,
and how many times as fast this library is. ``--profile`` adds where the device waits. ``benchmarks/table.py`` makes
tables and figures from the files of ``--json`` and ``--timelines``.

Peers are not installed: ``--sites DIR`` holds a folder for each, which is put before the path of its processes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.rows import ROWS

STACKS = ("ours", "torchtitan", "upstream", "accelerate", "fabric")


def run_row(stack, name, args):
    """Run a row in separate processes; return the worst of all ranks, or the reason why it was not measured."""
    lacks = importlib.import_module(f"benchmarks.stacks.{stack}").lacks(ROWS[name])
    if lacks:
        return {"failed": lacks}
    with tempfile.TemporaryDirectory() as folder:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", args.gpus]
        options = ["--gpus", args.gpus, "--steps", args.steps, "--warmup", args.warmup, *["--profile"] * args.profile]
        child = [Path(__file__).with_name("child.py"), stack, name, folder, *options]
        output = run([sys.executable, *map(str, [*torchrun, *child])], environment_of(stack, args.sites), args.timeout)
        ranks = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.rank.json"))]
        timeline = Path(folder) / "timeline.json"
        if args.timelines and timeline.exists():
            args.timelines.mkdir(parents=True, exist_ok=True)
            (args.timelines / f"{name}.{stack}.json").write_text(timeline.read_text())
    return combine(ranks) if len(ranks) == args.gpus else {"failed": reason(output)}


def run(command, environment, timeout):
    """Run a command and return what it printed; it and all its children end with the timeout."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout)
            late = ""
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks
            process.wait(60)
            late = f"\nno end within {timeout} s"
        output.seek(0)
        return output.read() + late


def environment_of(stack, sites):
    """The environment of a library's processes: its own folder comes first on Python's path."""
    paths = [str(sites / stack)] if sites and (sites / stack).is_dir() else []
    path = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}


def reason(output):
    """The first error of a failed run and what led to it; that memory ran out is enough of one."""
    lines = output.splitlines()
    errors = [number for number, line in enumerate(lines) if re.search(r"^\S*:?\s*[\w.]*(Error|Exception)\b", line)]
    if any("out of memory" in lines[number] for number in errors):
        return "out of memory"
    return "\n".join(lines[max(errors[0] - 16, 0) : errors[0] + 6] if errors else [*lines[-30:]])


def combine(ranks):
    """The worst number of all ranks; tokens/s are the mean, of steps that all of them wait for."""
    worst = {key: max(rank[key] for rank in ranks) for key in ranks[0] if isinstance(ranks[0][key], float)}
    return ranks[0] | worst | {"tokens_per_second": mean(rank["tokens_per_second"] for rank in ranks)}


def report(stack, name, result, ours):
    """Print one line of the table, and where the device waits if it was profiled."""
    title = f"{name:24s} {stack:10s}"
    if "failed" in result:
        print(f"{title} not measured: {result['failed']}", flush=True)
        return
    ratio = f"  ours is {ours / result['tokens_per_second']:.2f}x" if ours and stack != "ours" else ""
    predicted = f"  predicted {result['predicted_gib']:5.1f} GiB" if result.get("predicted_gib") else ""
    breaks = f"  graph breaks {result['graph_breaks']:.0f}" if "graph_breaks" in result else ""
    if result.get("chats") or result.get("images"):
        breaks += f"  waits for data {result['data_ms']:.2f} ms, at most {result['data_worst_ms']:.1f}"
    print(
        f"{title} {result['tokens_per_second']:9,.0f} tokens/s  {result['median_ms']:8.1f} ms  "
        f"slowest {result['worst_over_median']:4.2f}x  peak {result['peak_gib']:5.1f} GiB{predicted}  "
        f"reserved {result['reserved_gib']:5.1f} GiB  growth {result['growth_mib']:+.1f} MiB{breaks}{ratio}",
        flush=True,
    )
    if "gaps_ms" in result:
        report_waits(result)


def report_waits(result):
    exposed, gaps = result["exposed_collectives_ms"], result["gaps_ms"]
    print(f"{'':18s} compute {result['compute_ms']:.1f} ms, collectives alone {exposed:.1f}, gaps {gaps:.1f}")
    count, long = result["gaps_over_50us"], result["gaps_over_50us_ms"]
    print(f"{'':18s} {count:.0f} gaps over 50 us, {long:.1f} ms; the largest of all profiled steps:")
    for gap in result["largest_gaps"]:
        around = f"{gap['before']} | {gap['after']}, launched {gap['late_ms']:.2f} ms after it began"
        under, waits = " > ".join(gap["under"]), ", ".join(gap["host_waits"])
        line = f"{gap['ms']:5.2f} ms: {around}{under and f', in {under}'}{waits and f'; {waits}'}"
        print(f"{'':20s} {line}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="dense", help=f"comma-separated: {', '.join(ROWS)}")
    parser.add_argument("--peers", default="", help=f"comma-separated: {', '.join(STACKS[1:])}")
    parser.add_argument("--no-ours", action="store_true", help="run peers only")
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds for a row, compilation included")
    parser.add_argument("--profile", action="store_true", help="profile three further steps")
    parser.add_argument("--timelines", type=Path, help="write the spans of a profiled step into this folder")
    parser.add_argument("--sites", type=Path, help="a folder with one for each peer's packages")
    parser.add_argument("--json", type=Path, help="also append the results to this file, one line a row")
    args = parser.parse_args()
    stacks = [*["ours"] * (not args.no_ours), *filter(None, args.peers.split(","))]
    for name in args.rows.split(","):
        ours = None
        for stack in stacks:
            result = {**asdict(ROWS[name]), **run_row(stack, name, args)}
            ours = result.get("tokens_per_second") if stack == "ours" else ours
            report(stack, name, result, ours)
            if args.json:
                line = {"row": name, "stack": stack, "gpus": args.gpus, **result}
                with args.json.open("a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
