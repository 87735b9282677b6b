"""Bytes and times of a step's collectives by strategy and number of ranks, and what they predict beyond those measured.

    python benchmarks/scaling.py --check                           # the formulas beside a fake process group
    python benchmarks/scaling.py --measure rates.json --gpus 4     # times of collectives over NCCL, by their size
    python benchmarks/scaling.py --rates rates.json --row dense --one 39649 --measured 2:39547,4:38584

The formulas give every message of a step from the model's shapes alone. Times inside a host are those measured, between
them those of a network card per GPU (``--network``, GB/s), with the latency of a small message for each doubling of
hosts. A block's gathering and reduction hide behind a block's compute, of which the forward is a third; those of the
embedding and of what is outside of all units do not, nor do exchanges. Printed are GiB per step and rank, and tokens/s
per GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

GATHER, REDUCE, EXCHANGE = "all_gather", "reduce_scatter", "all_to_all"
HOST = 8
"""GPUs of a host."""


@dataclass(frozen=True)
class Layout:
    """What decides the messages of a step: ``world`` ranks, of which some share rows or experts, in bytes a number."""

    world: int
    rows: int = 1
    length: int = 64
    micro_batches: int = 1
    ulysses: int = 1
    experts: int = 1
    fixed: bool = False
    recompute: bool = False
    compute: int = 2
    reduce: int = 4

    @property
    def tokens(self) -> int:
        """Of a micro-batch on one rank."""
        return self.rows * self.length // self.ulysses


@dataclass(frozen=True)
class Message:
    """A collective of ``ranks`` ranks: bytes are those of the whole buffer, which all ranks hold together or send.

    ``block`` is the block in whose forward or backward it runs, None where nothing hides it.
    """

    operation: str
    bytes: int
    ranks: int
    block: int | None = None
    backward: bool = False


# ---------------------------------------------------------------- what is sent


def messages(model: Any, layout: Layout) -> Iterator[Message]:
    """Yield every message of a step of FSDP2, with what ``layout`` has beside it, of a model on the meta device."""
    from veomni.models import derive_plan

    plan = derive_plan(model)
    blocks = [model.get_submodule(name) for name in plan.blocks]
    apart = [model.get_submodule(name) for name in plan.experts] if layout.experts > 1 else []
    ends = [(name, None) for name in plan.embeddings] + [(name, len(blocks) - 1) for name in plan.heads]
    taken = {id(each) for module in apart for each in module.parameters()}
    for index, block in enumerate(blocks):
        kept = block is blocks[-1]
        yield from unit(own(block, taken), layout, layout.world, index, gathered_again=not kept)
        for module in [each for each in apart if any(each is one for one in block.modules())]:
            shapes = [(p.shape[0] // layout.experts, *p.shape[1:]) for p in module.parameters()]
            yield from unit(shapes, layout, layout.world // layout.experts, index, gathered_again=True, even=True)
            yield from expert_exchange(model.config, layout, index)
        if layout.ulysses > 1:
            yield from head_exchange(model.config, layout, index)
        taken |= {id(each) for each in block.parameters()}
    for name, beside in ends:
        end = model.get_submodule(name)
        yield from unit(own(end, taken), layout, layout.world, beside, gathered_again=False)
        taken |= {id(each) for each in end.parameters()}
    yield from unit(own(model, taken), layout, layout.world, None, gathered_again=False)


def own(module: Any, taken: set[int]) -> list[tuple[int, ...]]:
    return [tuple(each.shape) for each in module.parameters() if id(each) not in taken]


def unit(
    shapes: list[tuple[int, ...]],
    layout: Layout,
    ranks: int,
    block: int | None,
    *,
    gathered_again: bool,
    even: bool = False,
) -> Iterator[Message]:
    """A unit of ``fully_shard``: rows of each parameter are padded to a multiple of the ranks, unless they are even."""
    if ranks == 1 or not shapes:
        return
    numbers = sum(
        (shape[0] if even else math.ceil(shape[0] / ranks) * ranks) * math.prod(shape[1:]) for shape in shapes
    )
    for _ in range(layout.micro_batches):
        yield Message(GATHER, numbers * layout.compute, ranks, block)
        if gathered_again:
            yield Message(GATHER, numbers * layout.compute, ranks, block, backward=True)
    yield Message(REDUCE, numbers * layout.reduce, ranks, block, backward=True)


def head_exchange(config: Any, layout: Layout, block: int) -> Iterator[Message]:
    """Ulysses: queries, keys and values one way, the output back; the backward mirrors it."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", 0) or config.hidden_size // heads
    kv_heads = math.lcm(config.num_key_value_heads, layout.ulysses)
    width = layout.tokens * size * layout.compute
    for _ in range(layout.micro_batches):
        for backward in [False, *[True] * (1 + layout.recompute)]:
            yield Message(EXCHANGE, width * (heads + 2 * kv_heads), layout.ulysses, block, backward)
            yield Message(EXCHANGE, width * heads, layout.ulysses, block, backward)


def expert_exchange(config: Any, layout: Layout, block: int) -> Iterator[Message]:
    """Numbers of rows; choices, tokens and weights to the ranks of a token's experts; sums back; the backward mirrors.

    A recomputation sends what goes to the experts once more, and no sums back.
    """
    from veomni.ops.experts.exchange import ranks_of_token

    top_k = config.num_experts_per_tok
    ranks = ranks_of_token(config.num_experts, top_k, layout.experts, fixed=layout.fixed)
    rows = layout.tokens * ranks
    tokens, weights = (round(rows * width * layout.compute) for width in (config.hidden_size, top_k))
    there = [round(rows * top_k * 4), tokens, weights, *([] if layout.fixed else [layout.experts * 2 * 8])]
    for _ in range(layout.micro_batches):
        yield from (Message(EXCHANGE, size, layout.experts, block) for size in (*there, tokens))
        again = there if layout.recompute else []
        yield from (Message(EXCHANGE, size, layout.experts, block, True) for size in (*again, tokens, weights, tokens))


def totals(found: Iterator[Message]) -> dict[str, int]:
    """Return the bytes of each operation."""
    summed: Counter[str] = Counter()
    for message in found:
        summed[message.operation] += message.bytes
    return dict(summed)


# ---------------------------------------------------------------- what a step really sends


WHOLE_BUFFER = {
    "_allgather_base_": (GATHER, 0), "_reduce_scatter_base_": (REDUCE, 1), "alltoall_base_": (EXCHANGE, 1),
    "exchange_evenly": (EXCHANGE, 0),
}  # fmt: skip
"""The argument of a collective that holds all ranks' part, or goes to all of them."""


def counted(config: Any, layout: Layout) -> dict[str, int]:
    """Run a step as rank 0 of a process group without other ranks, and return the bytes of each operation."""
    import torch

    from veomni import Launcher, build_model
    from veomni.compat.dry_runs import join_fake_ranks
    from veomni.compat.tensors import TorchDispatchMode
    from veomni.strategies import FSDP2, ActivationCheckpointing, ExpertParallel, Ulysses
    from veomni.testing import seams

    summed: Counter[str] = Counter()

    class Bytes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace in ("c10d", "veomni"):
                name, at = WHOLE_BUFFER.get(func.overloadpacket.__name__, ("", 0))
                if name:
                    summed[name] += args[at].numel() * args[at].element_size()
            return func(*args, **(kwargs or {}))

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(layout.world), LOCAL_WORLD_SIZE=str(layout.world))
    join_fake_ranks(layout.world)
    beside = [Ulysses(layout.ulysses)] * (layout.ulysses > 1) + [ActivationCheckpointing("full")] * layout.recompute
    if layout.experts > 1:
        beside.append(ExpertParallel(layout.experts, exchange="fixed" if layout.fixed else "exact"))
    launcher = Launcher([FSDP2(), *beside], accelerator="cpu", precision="bf16")
    launcher.launch()
    model = launcher.setup_model(build_model(config, weights="random")).train()
    ids = torch.ones(layout.rows, layout.length, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(layout.length).expand_as(ids).contiguous()}

    def all_alike(sync: Any, counts: dict[str, float]) -> dict[str, float]:
        return {name: value * layout.world for name, value in counts.items()}

    with seams.replaced(seams.STEP_SYNC, all_alike), Bytes():
        for step in launcher.track([[batch] * layout.micro_batches] * 2):
            summed.clear()
            for micro in launcher.accumulate(model, step):
                launcher.backward(model(**micro.inputs).loss, micro)
    return dict(summed)


def check() -> bool:
    """Print formulas beside counts, for tiny models; return whether they are equal."""
    from tests.models.tiny import tiny_config
    from veomni import build_model
    from veomni.testing.ranks import run_ranks

    right = True
    for name, layout in CHECKED:
        (found,) = run_ranks(counted, 1, tiny_config(name), layout, init=False)
        expected = totals(messages(build_model(tiny_config(name), weights="random"), layout))
        right &= found == expected
        print(f"{name:10s} {layout}\n  formula {expected}\n  counted {found}")
    return right


CHECKED = [
    *(("llama", Layout(world, rows=2, micro_batches=2)) for world in (2, 4, 8)),
    ("qwen3", Layout(8, recompute=True)),
    *(("qwen3", Layout(world, ulysses=2, recompute=world == 8)) for world in (2, 4, 8)),
    *(("qwen3_moe", Layout(world, rows=2, experts=2, fixed=True)) for world in (2, 4, 8)),
    ("qwen3_moe", Layout(8, micro_batches=2, experts=4, ulysses=2, fixed=True)),
    ("qwen3_moe", Layout(4, rows=2, experts=2, fixed=True, recompute=True)),
]


# ---------------------------------------------------------------- how long it takes


def measure_rates(gpus: int, file: Path) -> None:
    """Time collectives of every size over NCCL on this host, and write ``{operation: [[bytes, seconds], ...]}``."""
    from veomni.testing.ranks import run_ranks

    times, *_ = run_ranks(timed_collectives, gpus, init=False, timeout=300)
    file.write_text(json.dumps({"gpus": gpus, **times}, indent=1) + "\n")
    for operation, points in times["seconds"].items():
        for size, seconds in points:
            rate = size * (gpus - 1) / gpus / seconds / 1e9
            print(
                f"{operation:15s} {size / 2**20:8.2f} MiB {seconds * 1e6:9.1f} us {rate:7.1f} GB/s a rank", flush=True
            )


def timed_collectives() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from veomni.accelerators import find_accelerator

    accelerator, rank, world = find_accelerator(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = accelerator.device(rank)
    accelerator.set_device(device)
    dist.init_process_group(accelerator.backend)
    found: dict[str, list[tuple[int, float]]] = {}
    for operation in (GATHER, REDUCE, EXCHANGE):
        found[operation] = []
        for size in (2**exponent for exponent in range(14, 31 if device.type != "cpu" else 19, 2)):
            whole = torch.zeros(size // 4, device=device)
            part = torch.zeros(size // 4 // world, device=device)
            run = {
                GATHER: partial(dist.all_gather_into_tensor, whole, part),
                REDUCE: partial(dist.reduce_scatter_tensor, part, whole),
                EXCHANGE: partial(dist.all_to_all_single, torch.empty_like(whole), whole),
            }[operation]
            for repeats in (3, 10):
                accelerator.synchronize()
                begin = time.perf_counter()
                for _ in range(repeats):
                    run()
                accelerator.synchronize()
            found[operation].append((size, (time.perf_counter() - begin) / 10))
    return {"seconds": found, "device": device.type if device.type == "cpu" else accelerator.module().get_device_name()}


def seconds_of(message: Message, rates: dict[str, Any], network: float) -> float:
    """Return the time of a message: between the measured sizes on a line, beyond the largest at its rate."""
    points, measured = rates["seconds"][message.operation], rates["gpus"]
    inside = min(message.ranks, HOST)
    scale = (1 - 1 / inside) / (1 - 1 / measured)
    (_, least), (large, most) = points[0], points[-1]
    size = message.bytes * inside / message.ranks if message.operation == EXCHANGE else message.bytes
    if size >= large:
        seconds = most * size / large
    else:
        above = next(index for index, (bytes_, _) in enumerate(points) if bytes_ >= size)
        (low, begin), (high, end) = points[max(above, 1) - 1], points[max(above, 1)]
        seconds = max(least, begin + (end - begin) * (size - low) / (high - low))
    seconds = max(least, seconds * scale) + least * math.log2(max(message.ranks / inside, 1))
    hosts = message.ranks / inside
    cards = 1 if message.operation == EXCHANGE else inside
    return max(seconds, message.bytes * (1 - 1 / hosts) / (cards * network * 1e9))


def predicted(
    found: list[Message], blocks: int, compute: float, rates: dict[str, Any], network: float
) -> tuple[float, float]:
    """Return the seconds of all messages of a step, and of those that a compute of so many seconds does not hide."""
    everything, exposed, hidden = 0.0, 0.0, Counter[tuple[int, bool]]()
    for message in found:
        seconds = seconds_of(message, rates, network)
        everything += seconds
        if message.block is None or message.operation == EXCHANGE:
            exposed += seconds
        else:
            hidden[message.block, message.backward] += seconds
    for (_, backward), seconds in hidden.items():
        exposed += max(0.0, seconds - compute * (2 if backward else 1) / 3 / blocks)
    return everything, exposed


def table(args: argparse.Namespace) -> None:
    """Print what each number of ranks sends, and its tokens/s per GPU beside those measured."""
    from benchmarks.rows import ROWS, build_config
    from veomni import build_model
    from veomni.models import derive_plan

    row, rates = ROWS[args.row], json.loads(args.rates.read_text())
    if row.ring:
        sys.exit(f"{args.row} has a ring, whose messages have no formula here")
    model = build_model(build_config(row), weights="random")
    known = dict(pair.split(":") for pair in args.measured.split(",") if pair)
    print("ranks   gathered   reduced exchanged GiB  messages     exposed  tokens/s  measured")
    for world in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        layout = Layout(
            world, row.rows, row.length, ulysses=share(row.ulysses, world), experts=share(row.experts, world),
            recompute=row.recompute == "full", reduce=2 if row.reduce == "bf16" else 4,
        )  # fmt: skip
        found = list(messages(model, layout))
        compute = layout.tokens / args.one
        everything, exposed = predicted(found, len(derive_plan(model).blocks), compute, rates, args.network)
        gib = [totals(iter(found)).get(name, 0) / 2**30 for name in (GATHER, REDUCE, EXCHANGE)]
        rate = layout.tokens / (compute + exposed)
        sizes = " ".join(f"{size:9.2f}" for size in gib)
        times = f"{everything * 1e3:8.1f} ms {exposed * 1e3:7.1f} ms"
        print(f"{world:5d}  {sizes}      {times} {rate:9,.0f}  {known.get(str(world), ''):>8s}", flush=True)


def share(size: int, world: int) -> int:
    """The ranks of an axis of a row: those that one host has, at most."""
    return min(world, HOST) if size == -1 else max(1, min(size, world))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the formulas with a fake process group")
    parser.add_argument("--measure", type=Path, help="time collectives on this host into this file")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rates", type=Path, help="what --measure wrote")
    parser.add_argument("--row", default="dense", help="of benchmarks/rows.py")
    parser.add_argument("--one", type=float, help="tokens/s measured on one GPU")
    parser.add_argument("--measured", default="", help="tokens/s per GPU by ranks: 2:39547,4:38584")
    parser.add_argument("--network", type=float, default=40.0, help="GB/s that a GPU has to other hosts")
    args = parser.parse_args()
    if args.check:
        sys.exit(not check())
    if args.measure:
        measure_rates(args.gpus, args.measure)
    if args.rates:
        table(args)


if __name__ == "__main__":
    main()
