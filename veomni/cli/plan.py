"""``veomni plan``: what a configuration means on a number of ranks, before anything is started."""

import argparse
from collections.abc import Iterator, Sequence
from itertools import chain
from math import inf
from typing import Any

from torch import nn

from veomni.cli.memory import RowMemory, count_parameters, rank_memory
from veomni.config.overrides import parse_argv
from veomni.errors import ConfigError, LayoutError
from veomni.metrics import FlopsCounter
from veomni.metrics.flops import expert_counts
from veomni.models import build_model, freeze
from veomni.ops.experts.exchange import ranks_of_token
from veomni.parallel.mesh import AXES, ParallelDims
from veomni.run_config import Config, check_layout
from veomni.strategies.select import mesh_dims
from veomni.strategies.transforms.precision import select_precision

_GIB = 1024**3
_USABLE = 0.95
"""Share of a device's memory that tensors may take: the rest is PyTorch's context, communication and fragments."""


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the plan."""
    config = Config.from_file(*parse_argv(rest))
    world = arguments.world
    if world is None:
        accelerator = config.train.accelerator.build()
        accelerator.require()
        world = config.train.local_processes(accelerator.device_type, accelerator.device_count())
    if world < 1:
        raise LayoutError(f"--world is {world}", "give a positive number of ranks")
    if arguments.device_memory is not None and not 0 < arguments.device_memory < inf:
        raise ConfigError(f"--device-memory is {arguments.device_memory}", "give the GiB of a device, such as 80")
    check_layout(config, world)
    model = build_model(config.model.build_config(), weights="random")
    freeze(model, config.model.freeze)
    dims = mesh_dims(config.train.build_strategies(), world)
    shards = dims.size("fsdp")
    memory = (arguments.device_memory or 0.0) * _GIB
    parts = (
        _mesh(config, world, dims), _exchange(config, model, dims), _batch(config, world, model),
        _memory(config, model, shards), _rows(config, model, shards, world, memory),
    )  # fmt: skip
    for name, fact in chain(*parts):
        print(f"{name:<28}{fact}")


def _mesh(config: Config, world: int, dims: ParallelDims) -> Iterator[tuple[str, str]]:
    yield "ranks", f"{world}"
    yield "mesh", " x ".join(f"{axis} {getattr(dims, axis)}" for axis in AXES)
    yield "parameters are sharded over", f"{dims.size('fsdp')} ranks ({config.train.data_parallel_mode})"
    if dims.experts > 1:
        placement = "strided" if dims.ep_strided > 1 else "adjacent"
        shards = f"each of them sharded over {dims.expert_shards}"
        yield "experts are spread over", f"{dims.experts} ranks ({placement}), {shards}"


def _exchange(config: Config, model: nn.Module, dims: ParallelDims) -> Iterator[tuple[str, str]]:
    """Yield how many ranks a token is sent to, and the memory of received tokens until the backward."""
    text: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    (experts, top_k), train = expert_counts(text), config.train
    if dims.experts == 1 or experts is None or top_k is None:
        return
    ranks = ranks_of_token(experts, top_k, dims.experts, fixed=train.fixed_exchange)
    tokens = train.micro_batch_size * config.data.max_seq_len // (dims.ulysses * dims.cp)
    size = tokens * ranks * text.hidden_size * select_precision(train.precision).compute.itemsize
    yield "a token is sent to", f"{ranks:.2f} of {dims.experts} ranks" + ("" if train.fixed_exchange else " on average")
    yield "received tokens per rank", f"{_size(size)} for each layer of experts, until its backward"


def _batch(config: Config, world: int, model: nn.Module) -> Iterator[tuple[str, str]]:
    train, rows = config.train, config.train.global_batch_size
    tokens = rows * config.data.max_seq_len
    micro_batches = f"{train.micro_batch_size} rows x {train.micro_batches(world)} micro-batches"
    yield "rows per step", f"{rows} = {micro_batches} x {train.data_ranks(world)} data ranks"
    yield "tokens per step", f"{tokens:,} = {rows} rows x {config.data.max_seq_len}"
    if train.max_steps is not None:
        yield "tokens in all", f"{tokens * train.max_steps:,} in {train.max_steps} steps"
    counter = FlopsCounter.from_model(model)
    if counter is not None:
        flops = counter.step_flops([config.data.max_seq_len] * config.train.global_batch_size)
        yield "FLOPs per step", f"{flops.causal:.4g} causal, {flops.full:.4g} full, if every document fills its row"


def _memory(config: Config, model: nn.Module, shards: int) -> Iterator[tuple[str, str]]:
    count, trained = count_parameters(model), count_parameters(model, trained=True)
    yield "parameters of the model", f"{count:,}" + (f", {trained:,} trained" if trained < count else "")
    memory = rank_memory(model, config.train, shards)
    where = "host" if config.train.strategy.arguments().get("cpu_offload") else "device"
    for name, needed in memory.items():
        yield f"{name} per rank", f"{_size(needed)} ({'device' if name == 'gathered' else where})"
    total = sum(memory.values())
    yield "total per rank", f"{_size(total)} ({'host and device' if where == 'host' else where})"
    accelerator = config.train.accelerator.build()
    if accelerator.is_available():
        there = accelerator.total_memory()
        left = f"leaves {_size(there - total)} for activations" if there > total else "does not fit"
        yield "a device here", f"{accelerator.name}, {_size(there)}: {left}"


def _rows(config: Config, model: nn.Module, shards: int, world: int, memory: float) -> Iterator[tuple[str, str]]:
    """Yield the peak of a step as configured and, for each activation policy, the longest row that fits a device."""
    train = config.train
    try:
        rows = RowMemory(model, train, shards, train.micro_batches(world))
    except ConfigError as error:
        yield "peak of a step", error.problem
        return
    tokens = train.row_tokens(config.data.max_seq_len)
    chosen = rows.chosen(config.data.max_seq_len)
    yield "peak of a step", f"{_size(rows.peak(tokens, chosen))} (device), activations: {chosen}"
    for policy, longest in rows.longest(memory * _USABLE) if memory else ():
        yield (
            "longest row",
            f"{longest * train.ranks_per_row // train.micro_batch_size:,} tokens, activations: {policy}",
        )


def _size(count: float) -> str:
    return f"{count / _GIB:.3f} GiB" if count >= _GIB / 10 else f"{count * 1024 / _GIB:.3f} MiB"
