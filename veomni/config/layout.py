"""Whether a world of ranks can be laid out as the configuration says, in plain arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from veomni.config.problems import Problem, raise_problems
from veomni.errors import LayoutError

if TYPE_CHECKING:
    from veomni.config.config import Config
    from veomni.config.train import TrainConfig

# Keys whose strategies come with a later release: whoever adds one deletes its entry.
_RESERVED = {"tensor_parallel_size": "tensor parallelism"}


def check_layout(config: Config, world_size: int) -> None:
    """Check mesh axes and batch sizes against the number of ranks, before any of them is started.

    Args:
        config: The configuration.
        world_size: Ranks over all nodes.

    Raises:
        LayoutError: they do not fit; names every key, and the fix.
    """
    raise_problems(_problems(config.train, world_size), "the layout", LayoutError)


def local_processes(train: TrainConfig, device_type: str, device_count: int) -> int:
    """Return how many processes this node starts.

    Args:
        train: The section ``train``.
        device_type: "cpu", or the accelerator's ``torch.device.type``.
        device_count: Accelerators on this node.
    """
    if train.devices != "auto":
        return train.devices
    if train.data_parallel_mode == "single":
        return 1
    return train.cpu_devices if device_type == "cpu" else device_count


def ranks_per_row(train: TrainConfig) -> int:
    """Return how many ranks work on the same rows."""
    return train.tensor_parallel_size * train.ulysses_parallel_size * train.context_parallel_size


def data_ranks(train: TrainConfig, world_size: int) -> int:
    """Return how many ranks, or groups of them, read different rows."""
    return world_size // ranks_per_row(train)


def micro_batches(train: TrainConfig, world_size: int) -> int:
    """Return how many micro-batches each data rank accumulates in an optimizer step."""
    return train.global_batch_size // (train.micro_batch_size * data_ranks(train, world_size))


def _problems(train: TrainConfig, world_size: int) -> Iterator[Problem]:
    axes = list(_axes(train, world_size))
    yield from axes
    if not axes:
        yield from _batch(train, world_size)


def _axes(train: TrainConfig, world_size: int) -> Iterator[Problem]:
    mode, replicas = train.data_parallel_mode, train.data_parallel_replicate_size
    for key, strategy in _RESERVED.items():
        if getattr(train, key) > 1:
            yield Problem(f"train.{key} is {getattr(train, key)}: {strategy} comes with a later release", "set it to 1")
    if train.ulysses_async and train.ulysses_parallel_size == 1:
        yield Problem("train.ulysses_async is true with train.ulysses_parallel_size 1", "set it to false")
    if mode == "single" and world_size > 1:
        problem = f"train.data_parallel_mode single runs in one process, but there are {world_size}"
        yield Problem(problem, "set train.devices to 1, or train.data_parallel_mode to ddp, fsdp1 or fsdp2")
    if replicas > 1 and mode not in ("fsdp1", "fsdp2"):
        problem = f"train.data_parallel_replicate_size {replicas} has no meaning with train.data_parallel_mode {mode}"
        yield Problem(problem, "set it to 1, or use fsdp1 or fsdp2")
    if train.expert_parallel_size > 1 and mode not in ("fsdp1", "fsdp2"):
        problem = (
            f"train.expert_parallel_size {train.expert_parallel_size} has no meaning with data_parallel_mode {mode}"
        )
        yield Problem(problem, "set it to 1, or train.data_parallel_mode to fsdp1 or fsdp2")
    product = replicas * ranks_per_row(train)
    if world_size % product == 0:
        yield from _experts(train, world_size // replicas)
    else:
        problem = (
            f"the {world_size} ranks are not a multiple of {product} = train.data_parallel_replicate_size {replicas} x "
            f"train.tensor_parallel_size {train.tensor_parallel_size} x "
            f"train.ulysses_parallel_size {train.ulysses_parallel_size} x "
            f"train.context_parallel_size {train.context_parallel_size}"
        )
        yield Problem(problem, f"start a multiple of {product} ranks (train.devices), or change the sizes")


def _experts(train: TrainConfig, shards: int) -> Iterator[Problem]:
    size = train.expert_parallel_size
    if shards % size:
        yield Problem(
            f"train.expert_parallel_size {size} does not divide the {shards} ranks that share parameters",
            f"use a divisor of {shards}, or start another number of ranks (train.devices)",
        )


def _batch(train: TrainConfig, world_size: int) -> Iterator[Problem]:
    rows = train.micro_batch_size * data_ranks(train, world_size)
    if train.global_batch_size % rows:
        problem = (
            f"train.global_batch_size {train.global_batch_size} is not a multiple of {rows} = train.micro_batch_size "
            f"{train.micro_batch_size} x {data_ranks(train, world_size)} data ranks"
        )
        above = -(-train.global_batch_size // rows) * rows
        yield Problem(problem, f"set train.global_batch_size to {above}, or change train.micro_batch_size")
