"""One rank of one row of benchmarks/scale.py, for one library: torchrun starts it, its numbers go to a file."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

# After everything else on the path: a peer has this library's name, and files beside this one have those of packages.
sys.path[:1] = []
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.clock import measure  # noqa: E402
from benchmarks.rows import ROWS  # noqa: E402


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("stack")
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    stack = importlib.import_module(f"benchmarks.stacks.{args.stack}")
    row, rank = ROWS[args.row], int(os.environ["RANK"])
    steps = stack.training(row, args.gpus)
    result = measure(steps, args.warmup, args.steps)
    if args.stack == "ours":
        result |= stack.facts(row, args.gpus)
    if args.profile:
        from benchmarks.timeline import profile

        result |= profile(steps, args.out / "timeline.json" if rank == 0 else None)
    (args.out / f"{rank}.rank.json").write_text(json.dumps(result | facts()))


def facts():
    """What ran where."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "torch": torch.__version__}


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # compiler threads and loaders of peers outlive their groups
