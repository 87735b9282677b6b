"""The parity check of tests/parity on GPUs: CUDA kernels proven sharded, several gloo ranks sharing one, or over NCCL.

    python benchmarks/parity_on_device.py --models qwen3,llama --accelerator cuda
    python benchmarks/parity_on_device.py --models olmoe --layouts ep2_fsdp2,ep2_fsdp1 --backend nccl
    python benchmarks/parity_on_device.py --attention sdpa,flash_attention_4 --head_dim 128 --precisions bf16

Prints, for every layout and precision, the worst relative error of any parameter's gradient against the float64 oracle;
where several attentions are named, also the worst difference from the first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.parity.layouts import EXPERT_LAYOUTS, LAYOUTS, one_step, oracle
from veomni.testing.oracle import BOUNDS, check
from veomni.testing.ranks import run_ranks

CASES = [
    *((layout, "fp64") for layout in ("single", "ddp2", "fsdp1_full", "fsdp2_2", "hsdp_2x2")),
    *((layout, precision) for layout in ("single", "ddp2", "fsdp1_full", "fsdp2_2") for precision in ("fp32", "bf16")),
    *(
        (layout, precision)
        for layout in ("ulysses2_ddp", "async2_ddp", "ring2_ddp", "ring2_async2_ddp")
        for precision in BOUNDS
    ),
]
EXPERT_CASES = [
    (layout, precision)
    for layout in ("ep2_fsdp2", "ep2_chunks", "ep2_fixed", "ep2_fsdp1", "ep2_ddp")
    for precision in BOUNDS
]
SPLIT_CASES = [
    (layout, precision) for layout in ("ulysses2_fsdp2", "ring2_fsdp1", "async2_fsdp1") for precision in BOUNDS
]

ALL_CASES = CASES + EXPERT_CASES + SPLIT_CASES


SECONDS = 300.0
"""For a case: kernels may be compiled in each of its processes."""


def worst(outcomes, truth):
    return max(
        float((outcome.gradients[name].double() - expected.double()).norm() / expected.double().norm())
        for outcome in outcomes
        for name, expected in truth.gradients.items()
    )


def run_case(model, layout, precision, truth, args, changes):
    """Print a line for every attention; return whether all are within the bounds."""
    first = None
    for attention in args.attention.split(","):
        case = f"{model:12s} {layout:14s} {precision:5s} {attention:18s}"
        try:
            outcomes = run_ranks(
                one_step, (LAYOUTS | EXPERT_LAYOUTS)[layout][0], model, layout, init=False, timeout=SECONDS,
                backend=args.backend, accumulation=3, precision=precision, accelerator=args.accelerator,
                attention=attention, changes=changes,
            )  # fmt: skip
            for outcome in outcomes:
                check(outcome, truth, BOUNDS[precision])
        except AssertionError as error:
            print(f"{case}  FAILED {str(error)[-600:]}", flush=True)
            return False
        difference = "" if first is None else f", {worst(outcomes, first):.1e} from the first"
        first = first or outcomes[0]
        print(f"{case}  {worst(outcomes, truth):.1e}{difference}", flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="qwen3")
    parser.add_argument("--accelerator", default="cuda")
    parser.add_argument("--backend", default="gloo")
    parser.add_argument("--attention", default="auto", help="names, separated by commas")
    parser.add_argument("--head_dim", type=int, help="of all models; flash-attention packages have kernels for some")
    parser.add_argument("--precisions", default=",".join(BOUNDS))
    parser.add_argument("--layouts", default=",".join(dict.fromkeys(layout for layout, _ in CASES)))
    args = parser.parse_args()
    right = True
    changes = {} if args.head_dim is None else {"head_dim": args.head_dim}
    layouts, precisions = args.layouts.split(","), args.precisions.split(",")
    for model in args.models.split(","):
        # In a process of its own: a process that has touched CUDA cannot be forked again.
        (truth,) = run_ranks(oracle, 1, model, args.accelerator, init=False, timeout=SECONDS, **changes)
        for layout, precision in (case for case in ALL_CASES if case[0] in layouts and case[1] in precisions):
            right &= run_case(model, layout, precision, truth, args, changes)
    sys.exit(not right)


if __name__ == "__main__":
    main()
