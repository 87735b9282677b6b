"""``veomni plan``: what a configuration means on a number of ranks, before anything is started."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from veomni.config import Config
    from veomni.parallel.mesh import ParallelDims

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
    from veomni.accelerators import select_accelerator
    from veomni.config import Config, check_layout
    from veomni.config.layout import local_processes
    from veomni.config.overrides import parse_argv
    from veomni.errors import LayoutError

    config = Config.from_file(*parse_argv(rest))
    world = arguments.world
    if world is None:
        accelerator = select_accelerator(config.train.accelerator)
        world = local_processes(config.train, accelerator.device_type, accelerator.device_count())
    if world < 1:
        raise LayoutError(f"--world is {world}", "give a positive number of ranks")
    check_layout(config, world)
    model = _model(config)
    for part in (_mesh(config, world), _batch(config, world), _flops(config, model), _memory(config, world, model)):
        for name, fact in part:
            print(f"{name:<28}{fact}")


def _model(config: Config) -> nn.Module:
    from veomni.models import build_model, freeze

    section = config.model
    model = build_model(
        section.config_path or str(section.model_path),
        overrides=section.config_overrides,
        weights="random",
        trust_remote_code=section.trust_remote_code,
    )
    freeze(model, section.freeze)
    return model


def _mesh(config: Config, world: int) -> Iterator[tuple[str, str]]:
    from veomni.parallel.mesh import AXES

    dims = _dims(config, world)
    yield "ranks", f"{world}"
    yield "mesh", " x ".join(f"{axis} {getattr(dims, axis)}" for axis in AXES)
    yield "parameters are sharded over", f"{dims.fsdp} ranks ({config.train.data_parallel_mode})"
    if dims.ep > 1:
        far = "far apart" if dims.ep_outside else "neighbours"
        yield "experts are spread over", f"{dims.ep} ranks ({far}), each of them sharded over {dims.fsdp // dims.ep}"


def _dims(config: Config, world: int) -> ParallelDims:
    from veomni.parallel.mesh import ParallelDims

    train = config.train
    sharded = train.data_parallel_mode in ("fsdp1", "fsdp2")
    return ParallelDims(
        dp_replicate=train.data_parallel_replicate_size if sharded else -1,
        dp_shard=-1 if sharded else 1,
        ulysses=train.ulysses_parallel_size,
        cp=train.context_parallel_size,
        tp=train.tensor_parallel_size,
        ep=train.expert_parallel_size,
        ep_outside=train.expert_parallel.outside,
    ).resolve(world)


def _batch(config: Config, world: int) -> Iterator[tuple[str, str]]:
    from veomni.config.layout import data_ranks, micro_batches

    train, rows = config.train, config.train.global_batch_size
    tokens = rows * config.data.max_seq_len
    yield (
        "rows per step",
        (
            f"{rows} = {train.micro_batch_size} rows x {micro_batches(train, world)} micro-batches x "
            f"{data_ranks(train, world)} data ranks"
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
    from veomni.strategies.transforms.precision import select_precision

    precision = select_precision(config.train.precision)
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    memory = rank_memory(model, derive_plan(model), config.train, precision, _dims(config, world).fsdp)
    yield "parameters of the model", f"{count:,}" + (f", {trained:,} trained" if trained < count else "")
    where = "host" if config.train.fsdp.cpu_offload else "device"
    for name in ("parameters", "gradients", "optimizer", "gathered", "total"):
        place = "device" if name == "gathered" else "host and device" if name == "total" and where == "host" else where
        yield f"{name} per rank", f"{getattr(memory, name) / _GIB:.3f} GiB ({place})"
    yield "besides", "activations, which depend on train.gradient_checkpointing, are not counted"
