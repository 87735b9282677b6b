"""``veomni plan``: what a configuration means on a number of ranks, before anything is started."""

import argparse
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from veomni.config.overrides import parse_argv
from veomni.errors import LayoutError
from veomni.metrics import FlopsCounter
from veomni.metrics.flops import chosen_of_experts
from veomni.models import build_model, derive_plan, freeze
from veomni.ops.experts.exchange import ranks_of_token
from veomni.optim import OptimizerSection, hidden_matrices
from veomni.parallel.mesh import AXES, ParallelDims
from veomni.run_config import Config, check_layout
from veomni.run_config.train import TrainSection
from veomni.strategies.select import mesh_dims
from veomni.strategies.transforms.precision import Precision, select_precision

_GIB = 1024**3


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
    check_layout(config, world)
    model = build_model(config.model.build_config(), weights="random")
    freeze(model, config.model.freeze)
    dims = mesh_dims(config.train.build_strategies(), world)
    parts = (
        _mesh(config, world, dims), _exchange(config, model, dims), _batch(config, world, model),
        _memory(config, model, dims.size("fsdp")),
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
    """Yield how often tokens are sent to experts, and what the received ones take until the backward."""
    text: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    (experts, top_k), train = chosen_of_experts(text), config.train
    if dims.experts == 1 or experts is None or top_k is None:
        return
    everywhere = train.expert_parallel.arguments().get("exchange") == "fixed"
    ranks = dims.experts if everywhere else ranks_of_token(experts, top_k, dims.experts)
    tokens = train.micro_batch_size * config.data.max_seq_len // (dims.ulysses * dims.cp)
    size = tokens * ranks * text.hidden_size * select_precision(train.precision).compute.itemsize
    yield "a token is sent to", f"{ranks:.2f} of {dims.experts} ranks" + ("" if everywhere else " on average")
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
    count, trained = _count(model), _count(model, trained=True)
    yield "parameters of the model", f"{count:,}" + (f", {trained:,} trained" if trained < count else "")
    memory = rank_memory(model, config.train, shards)
    where = "host" if config.train.strategy.arguments().get("cpu_offload") else "device"
    for name, needed in memory.items():
        yield f"{name} per rank", f"{_size(needed)} ({'device' if name == 'gathered' else where})"
    total = sum(memory.values())
    yield "total per rank", f"{_size(total)} ({'host and device' if where == 'host' else where})"
    yield "besides", "activations, which depend on train.activation_checkpointing, are not counted"
    accelerator = config.train.accelerator.build()
    if accelerator.is_available():
        there = accelerator.total_memory()
        left = f"leaves {_size(there - total)} for activations" if there > total else "does not fit"
        yield "a device here", f"{accelerator.name}, {_size(there)}: {left}"


def _size(count: float) -> str:
    return f"{count / _GIB:.3f} GiB" if count >= _GIB / 10 else f"{count * 1024 / _GIB:.3f} MiB"


def rank_memory(model: nn.Module, train: TrainSection, shards: int) -> dict[str, float]:
    """Return bytes on one rank by what takes them, without activations; parameters are spread over ``shards`` ranks.

    ``gathered`` are copies in the compute format: units gathered by FSDP (two blocks at a time, or one and an embedding
    or head; all of them when they stay gathered; of the experts only the rank's own), or the weights that autocast
    keeps under ``single`` and ``ddp``.
    """
    precision = select_precision(train.precision)
    trained, size = _count(model, trained=True), precision.storage.itemsize
    needed = {
        "parameters": _count(model) * size, "gradients": trained * size,
        "optimizer": _optimizer_bytes(model, trained, train, precision.storage),
    }  # fmt: skip
    found = {name: count / shards for name, count in needed.items()}
    return {**found, "gathered": _gathered(model, train, precision, shards)}


def _optimizer_bytes(model: nn.Module, trained: int, train: TrainSection, storage: torch.dtype) -> float:
    section = train.optimizer
    if section.chosen == "muon":
        options = section.arguments()
        matrices = sum(matrix.numel() for matrix in hidden_matrices(model, exclude=options["exclude"]))
        moment = 2 if options["moments"] == "bf16" else storage.itemsize
        return matrices * storage.itemsize + 2 * (trained - matrices) * moment
    return trained * _state_per_parameter(section, storage)


def _state_per_parameter(section: OptimizerSection, storage: torch.dtype) -> float:
    """Return how many bytes a step leaves per parameter, found by taking one on a layer."""
    layer = nn.Linear(512, 512, bias=False, dtype=storage)
    optimizer = section.model_copy(update={"no_decay": [], "lr_scale": {}}).build(layer)
    layer.weight.grad = torch.ones_like(layer.weight)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    kept = [value for value in optimizer.state[layer.weight].values() if isinstance(value, Tensor) and value.ndim]
    return sum(part.nbytes for value in kept for part in _stored(value)) / layer.weight.numel()


def _stored(tensor: Any) -> list[Tensor]:
    """Return the tensors that one is made of: codes and scales of torchao's 8-bit moments, else itself."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
    return [getattr(tensor, name) for name in names] or [tensor]


def _gathered(model: nn.Module, train: TrainSection, precision: Precision, shards: int) -> float:
    plan = derive_plan(model)
    elsewhere = 1 - 1 / train.expert_parallel_size  # the share of the experts that other ranks hold
    experts = {name: elsewhere * _count(model.get_submodule(name)) for name in plan.experts}
    everything = _count(model) - sum(experts.values())
    if train.data_parallel_mode in ("single", "ddp"):
        return everything * precision.compute.itemsize if precision.mixed else 0
    if shards == 1 and not precision.mixed:
        return 0
    sizes = [
        _count(model.get_submodule(block)) - sum(size for name, size in experts.items() if name.startswith(f"{block}."))
        for block in plan.blocks
    ]
    options = train.strategy.arguments()
    ends = [_count(model.get_submodule(name)) for name in (*plan.embeddings, *plan.heads)]
    ends = ends if train.data_parallel_mode == "fsdp2" else []  # others hold them in the outermost unit
    stays = not options.get("reshard_after_forward", True) or options.get("sharding") == "grad_op"
    if stays:
        return everything * precision.compute.itemsize
    block = max(sizes, default=0)
    at_once = block + max(block * max(1, options.get("prefetch", 0)), *ends, 0)
    return min(everything, everything - sum(sizes) - sum(ends) + at_once) * precision.compute.itemsize


def _count(module: nn.Module, *, trained: bool = False) -> int:
    return sum(each.numel() for each in module.parameters() if each.requires_grad or not trained)
