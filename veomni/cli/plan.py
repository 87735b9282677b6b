"""``veomni plan``: what a configuration means on a number of ranks, before anything is started."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from veomni.run_config import Config

HELP = "print the mesh, the memory of a rank and the batch arithmetic of a configuration"
TAKES_CONFIG = True
_GIB = 1024**3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; the configuration and its overrides are what is left."""
    parser.usage = "veomni plan CONFIG.yaml [--section.key VALUE ...] [--world N]"
    parser.add_argument("--world", type=int, metavar="N", help="ranks over all nodes (default: what this node starts)")


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the plan.

    Raises:
        LayoutError: the layout does not work.
        InputError: the configuration or the model cannot be used.
    """
    from veomni.config.overrides import parse_argv
    from veomni.errors import LayoutError
    from veomni.run_config import Config, check_layout

    config = Config.from_file(*parse_argv(rest))
    world = arguments.world
    if world is None:
        accelerator = config.train.accelerator.build()
        accelerator.require()
        world = config.train.local_processes(accelerator.device_type, accelerator.device_count())
    if world < 1:
        raise LayoutError(f"--world is {world}", "give a positive number of ranks")
    check_layout(config, world)
    model = _model(config)
    for part in (_mesh(config, world), _batch(config, world), _flops(config, model), _memory(config, world, model)):
        for name, fact in part:
            print(f"{name:<28}{fact}")


def _model(config: Config) -> nn.Module:
    from veomni.models import build_model, freeze

    model = build_model(config.model.build_config(), weights="random")
    freeze(model, config.model.freeze)
    return model


def _mesh(config: Config, world: int) -> Iterator[tuple[str, str]]:
    from veomni.parallel.mesh import AXES
    from veomni.strategies.select import mesh_dims

    dims = mesh_dims(config.train.build_strategies(), world)
    yield "ranks", f"{world}"
    yield "mesh", " x ".join(f"{axis} {getattr(dims, axis)}" for axis in AXES)
    yield "parameters are sharded over", f"{dims.fsdp} ranks ({config.train.data_parallel_mode})"
    if dims.experts > 1:
        placement = "strided" if dims.ep_strided > 1 else "adjacent"
        shards = f"each of them sharded over {dims.expert_shards}"
        yield "experts are spread over", f"{dims.experts} ranks ({placement}), {shards}"


def _batch(config: Config, world: int) -> Iterator[tuple[str, str]]:
    train, rows = config.train, config.train.global_batch_size
    tokens = rows * config.data.max_seq_len
    yield (
        "rows per step",
        (
            f"{rows} = {train.micro_batch_size} rows x {train.micro_batches(world)} micro-batches x "
            f"{train.data_ranks(world)} data ranks"
        ),
    )
    yield "tokens per step", f"{tokens:,} = {rows} rows x {config.data.max_seq_len}"
    if train.max_steps is not None:
        yield "tokens in all", f"{tokens * train.max_steps:,} in {train.max_steps} steps"


def _flops(config: Config, model: nn.Module) -> Iterator[tuple[str, str]]:
    from veomni.metrics import FlopsCounter

    counter = FlopsCounter.from_model(model)
    if counter is not None:
        flops = counter.step_flops([config.data.max_seq_len] * config.train.global_batch_size)
        yield "FLOPs per step", f"{flops.causal:.4g} causal, {flops.full:.4g} full, if every document fills its row"


def _memory(config: Config, world: int, model: nn.Module) -> Iterator[tuple[str, str]]:
    from veomni.cli.memory import rank_memory
    from veomni.models import derive_plan
    from veomni.strategies.select import mesh_dims
    from veomni.strategies.transforms.precision import select_precision

    precision = select_precision(config.train.precision)
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    shards = mesh_dims(config.train.build_strategies(), world).fsdp
    memory = rank_memory(model, derive_plan(model), config.train, precision, shards)
    yield "parameters of the model", f"{count:,}" + (f", {trained:,} trained" if trained < count else "")
    where = "host" if config.train.strategy.arguments().get("cpu_offload") else "device"
    for name in ("parameters", "gradients", "optimizer", "gathered", "total"):
        place = "device" if name == "gathered" else "host and device" if name == "total" and where == "host" else where
        yield f"{name} per rank", f"{_size(getattr(memory, name))} ({place})"
    yield "besides", "activations, which depend on train.activation_checkpointing, are not counted"
    yield from _verdict(config, memory.total)


def _size(count: float) -> str:
    return f"{count / _GIB:.3f} GiB" if count >= _GIB / 10 else f"{count * 1024 / _GIB:.3f} MiB"


def _verdict(config: Config, needed: float) -> Iterator[tuple[str, str]]:
    accelerator = config.train.accelerator.build()
    if not accelerator.is_available():
        return
    there = accelerator.total_memory()
    left = f"leaves {_size(there - needed)} for activations" if there > needed else "does not fit"
    yield "a device here", f"{accelerator.name}, {_size(there)}: {left}"
