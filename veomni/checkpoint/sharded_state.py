"""Model and optimizer as one flat table of fully qualified names, the same in every layout."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from veomni.checkpoint.manifest import content_problem
from veomni.checkpoint.safe_storage import SafePlanner, SafeReader
from veomni.compat.tensors import with_shard
from veomni.errors import CheckpointError
from veomni.parallel.wrappers import local_shard

WEIGHTS = "weights"
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
# Options of an optimizer that choose a kernel: what fits this run's devices and layout, not those of the saved one.
_KERNELS = re.compile(r"optimizer\.param_groups\..*\.(fused|foreach)")


def sharded_state(model: nn.Module | None, optimizer: Optimizer | None) -> dict[str, Any]:
    """Return ``model.*`` and ``optimizer.*`` entries; tensors are DTensors where the layout shards them."""
    table: dict[str, Any] = {}
    if model is not None:
        table |= {f"model.{name}": value for name, value in get_model_state_dict(model, options=_OPTIONS).items()}
    if model is not None and optimizer is not None:
        found = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
        table |= {f"optimizer.{name}": value for name, value in found.items()}
    return table


def restore(model: nn.Module | None, optimizer: Optimizer | None, table: dict[str, Any]) -> None:
    """Put a table that was loaded in place back into model and optimizer."""
    parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
    for name, value in table.items():
        kind, _, rest = name.partition(".")
        parts[kind][rest] = value
    if model is not None:
        set_model_state_dict(model, parts["model"], options=_OPTIONS)
    if model is not None and optimizer is not None:
        set_optimizer_state_dict(model, optimizer, parts["optimizer"], options=_OPTIONS)


@torch.no_grad()
def in_host_memory(table: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a table in host memory, which is pinned where it comes from a CUDA device."""
    copies = dict(table)
    for name, value in table.items():
        if isinstance(value, Tensor) and hasattr(local_shard(value), "__tensor_flatten__"):
            copied = _host_copy(local_shard(value))
            copies[name] = with_shard(value, copied) if isinstance(value, DTensor) else copied
        elif isinstance(value, Tensor):
            # Not value.to("cpu"): its sharding rule takes time exponential in the axes of the mesh.
            copies[name] = copied = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            local_shard(copied).copy_(local_shard(value), non_blocking=True)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return copies


def _host_copy(wrapper: Any) -> Tensor:
    """Copy a tensor that is made of others, as torchao's 8-bit moments are: it has no operation that does."""
    names, context = wrapper.__tensor_flatten__()
    parts = {name: getattr(wrapper, name).to("cpu", copy=True) for name in names}
    return type(wrapper).__tensor_unflatten__(parts, context, wrapper.size(), wrapper.stride())


def save_table(table: dict[str, Any], directory: Path, group: dist.ProcessGroup | None) -> None:
    """Write a table; every rank writes what it holds, one thread each: more of them swallow errors (pytorch#191391)."""
    writer = FileSystemWriter(directory, thread_count=1, sync_files=True)
    save(table, storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())


def own_cause(error: BaseException, rank: int) -> str | None:
    """Return what failed on ``rank``; None where only others failed, as PyTorch raises their errors on all ranks."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    if failures and rank not in failures:
        return None
    cause = failures[rank][0] if failures else error
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def load_table(table: dict[str, Any], directory: Path) -> None:
    """Read a table in place, whatever layout wrote it; CheckpointError names what differs in names or shapes."""
    wanted = {name: value for name, value in table.items() if not _KERNELS.fullmatch(name)}
    _check_match(wanted, SafeReader(directory).read_metadata().state_dict_metadata, directory)
    try:
        load(wanted, storage_reader=SafeReader(directory), planner=SafePlanner(), no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(f"{directory} cannot be read: {error}", "use another checkpoint") from error
    table.update(wanted)


def read_model_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield names and whole tensors of the model in a valid ``global_step_N``, one at a time and without the model."""
    problem = content_problem(checkpoint)
    if problem:
        raise CheckpointError(f"{checkpoint}: {problem}", "give another global_step_N directory of a run")
    directory = checkpoint / WEIGHTS
    for name, entry in SafeReader(directory).read_metadata().state_dict_metadata.items():
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata):
            table = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
            load(table, storage_reader=SafeReader(directory), planner=SafePlanner(), no_dist=True)
            yield name.removeprefix("model."), table[name]


def _check_match(table: dict[str, Any], saved: dict[str, Any], directory: Path) -> None:
    wanted, stored = ({name for name in names if name.startswith("model.")} for names in (table, saved))
    problems = [
        *(f"missing {name}" for name in sorted(wanted - stored)),
        *(f"unexpected {name}" for name in sorted(stored - wanted)),
        *(
            f"{name} {tuple(saved[name].size)} there, {tuple(value.shape)} here"
            for name, value in table.items()
            if isinstance(value, Tensor) and isinstance(saved.get(name), TensorStorageMetadata)
            if saved[name].size != value.shape
        ),
        *(f"missing {name}" for name in sorted(table.keys() - saved.keys() - wanted)),
    ]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        fix = "use the model and optimizer of the run that saved it"
        raise CheckpointError(f"{directory} does not fit this run: {shown}", fix)
