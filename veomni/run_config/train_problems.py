"""Keys of the section ``train`` that contradict each other, or the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import TYPE_CHECKING

from veomni.accelerators.base import Accelerator
from veomni.config.problems import Problem
from veomni.errors import InputError
from veomni.strategies.select import mesh_dims, select_strategies

if TYPE_CHECKING:
    from veomni.run_config.train import TrainSection

_SIZES = ("data_parallel_replicate_size", "tensor_parallel_size", "ulysses_parallel_size", "context_parallel_size")

_SAME = {
    "float8": {"float8"}, "compile": {"compile"}, "balance_encoders": {"encoder_balance"},
    "activation_checkpointing": {"activation_checkpointing", "activation_budget"},
    "activation_memory": {"activation_checkpointing", "activation_budget", "tiled_mlp"},
}  # fmt: skip
"""Strategies of ``train.strategies`` that a key decides about already."""


def contradictions(train: TrainSection) -> Iterator[Problem]:
    """Yield what is wrong for any number of ranks."""
    if train.data_parallel_mode == "single" and train.devices not in ("auto", 1):
        yield Problem(
            f"train.data_parallel_mode single runs in one process, but train.devices is {train.devices}",
            "set train.devices to 1, or train.data_parallel_mode to ddp, fsdp1 or fsdp2",
        )
    family = train.accelerator.component
    backends = dict.fromkeys(("auto", getattr(family, "backend", ""), "gloo"))
    if isinstance(family, type) and issubclass(family, Accelerator) and train.backend not in backends:
        problem = f"train.backend {train.backend} does not serve train.accelerator {family.name}"
        yield Problem(problem, f"use {' or '.join(backends)}")
    if train.reduce_dtype == "bf16" and train.precision != "bf16":
        problem = f"train.reduce_dtype bf16 has no meaning with train.precision {train.precision}"
        yield Problem(problem, "leave it out, or set train.precision to bf16")
    float8 = train.float8 != "none" or any(section.chosen == "float8" for section in train.strategies)
    if float8 and train.precision == "fp64":
        problem = "float8 (train.float8, train.strategies) has no meaning with train.precision fp64"
        yield Problem(problem, "leave it out, or set train.precision to bf16")
    if train.activation_memory is not None and (train.activation_checkpointing != "none" or train.activation_offload):
        problem = "train.activation_memory chooses train.activation_checkpointing and train.activation_offload"
        yield Problem(problem, "leave them out, or leave out train.activation_memory")
    elif train.activation_offload and train.activation_checkpointing == "none":
        problem = "train.activation_offload has no meaning with train.activation_checkpointing none"
        yield Problem(problem, "set train.activation_checkpointing to full")
    for key, same in _SAME.items():
        given = getattr(train, key) != type(train).model_fields[key].default
        for twice in sorted(same & {section.chosen for section in train.strategies}) if given else ():
            yield Problem(f"train.{key} decides what {twice} in train.strategies does", "give one of them")
    for key, size in (("expert_parallel", train.expert_parallel_size), ("ulysses", train.ulysses_parallel_size)):
        changed = getattr(train, key).model_dump(exclude_defaults=True)
        if size == 1 and changed:
            names = ", ".join(f"train.{key}.{name} {value}" for name, value in changed.items())
            size_key = f"train.{key.removesuffix('_parallel')}_parallel_size"
            yield Problem(f"{names} has no meaning with {size_key} 1", "leave it out, or use a larger size")


def layout_problems(train: TrainSection, world: int) -> Iterator[Problem]:
    """Yield the first thing that keeps ``world`` ranks from being laid out."""
    replicas, product = train.data_parallel_replicate_size, train.data_parallel_replicate_size * train.ranks_per_row
    if train.tensor_parallel_size > 1:
        problem = f"train.tensor_parallel_size is {train.tensor_parallel_size}: there is no tensor parallelism yet"
        yield Problem(problem, "set it to 1")
    elif replicas > 1 and "replicate" not in signature(train.strategy.component).parameters:
        problem = f"train.data_parallel_replicate_size {replicas} has no meaning with "
        problem += f"train.data_parallel_mode {train.data_parallel_mode}"
        yield Problem(problem, "set it to 1, or use fsdp1 or fsdp2")
    elif world % product:
        sizes = " x ".join(f"train.{key} {getattr(train, key)}" for key in _SIZES)
        problem = f"the {world} ranks are not a multiple of {product} = {sizes}"
        yield Problem(problem, f"start a multiple of {product} ranks (train.devices), or change the sizes")
    else:
        yield from _problems_of_objects(train, world)


def _problems_of_objects(train: TrainSection, world: int) -> Iterator[Problem]:
    try:
        strategies = train.build_strategies()
        for strategy in strategies:
            strategy.check(world)
        mesh_dims(select_strategies(strategies), world)
    except InputError as error:
        yield Problem(error.problem, error.fix, error.field)
        return
    rows = train.micro_batch_size * train.data_ranks(world)
    if train.global_batch_size % rows:
        problem = f"train.global_batch_size {train.global_batch_size} is not a multiple of {rows} = "
        problem += f"train.micro_batch_size {train.micro_batch_size} x {train.data_ranks(world)} data ranks"
        above = -(-train.global_batch_size // rows) * rows
        yield Problem(problem, f"set train.global_batch_size to {above}, or change train.micro_batch_size")
