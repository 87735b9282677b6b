"""Weights out, streamed: of transformers models in Hugging Face layout, of any other module by its own names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from veomni.errors import ModelError, VeOmniError
from veomni.logging import create_logger
from veomni.models.loader import model_class
from veomni.models.transformers_api.capabilities import keeps_fp32, set_config_flag
from veomni.models.transformers_api.construction import construct, tied_parameters
from veomni.models.transformers_api.conversions import copy_conversions, saving_conversions
from veomni.models.weights.safetensors_files import SafetensorsWriter
from veomni.parallel.wrappers import fsdp1_parameters, plain_name, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = create_logger(__name__)

GIB = 1024**3
Tensors = Iterable[tuple[str, Tensor]]
"""Names in the model and full tensors, which are not needed again once taken."""


def export_hf(
    model: nn.Module,
    output_dir: Path | str,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * GIB,
) -> Path:
    """Write a model's weights; collective, rank 0 writes, one parameter is gathered at a time.

    A transformers model is written as ``from_pretrained`` reads it; a composed model component by component, each into
    a directory of its own; any other module as ``model.safetensors``, by the names of its ``state_dict``.

    Args:
        model: Any module, sharded or wrapped by any strategy.
        output_dir: An earlier export there is replaced once the new one is complete; anything else is a ModelError.
        tokenizer: A tokenizer or processor to save beside the weights.
        dtype: Dtype of the weights in the files; None keeps that of the parameters.
        max_shard_size: Bytes per file at most, unless a single tensor is larger.
    """
    inner: Any = unwrap(model)
    export = _Export(Path(output_dir), tokenizer, dtype, max_shard_size)
    known = hasattr(getattr(inner, "config", None), "save_pretrained")
    parts = {name: full_tensors(model, name) for name in getattr(inner, "component_names", [""])}
    if not known:
        parts = {"": _full_state(model)}

    def write() -> None:
        export.write(_skeleton(inner.config, inner, parts) if known else None, parts)

    _on_rank_zero(write, parts.values())
    return export.output_dir


def export_tensors(
    config: PreTrainedConfig | None,
    tensors: Tensors,
    output_dir: Path | str,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * GIB,
) -> Path:
    """Write full tensors, in any order, as :func:`export_hf` does; without a ``config``, by their names.

    No process group is needed. A tensor that is missing, unknown or of another shape is a ModelError, as is a directory
    that holds something else.
    """
    export = _Export(Path(output_dir), tokenizer, dtype, max_shard_size)
    export.write(None if config is None else _skeleton(config), {"": tensors})
    return export.output_dir


@dataclass
class _Export:
    """Where an export goes, and how it is written."""

    output_dir: Path
    tokenizer: Any
    dtype: torch.dtype | None
    max_shard_size: int

    def write(self, skeleton: Any, parts: Mapping[str, Tensors]) -> None:
        """Write the tensors of the parts of a model, "" being all of it; without a skeleton, by their names."""
        with _published(self.output_dir) as partial:
            writers = [self._write_part(skeleton, part, tensors, partial) for part, tensors in parts.items()]
            if skeleton is not None and "" not in parts:
                _save_configs(skeleton, partial, skeleton.config.dtype)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(partial)
        count, size = (sum(getattr(writer, name) for writer in writers) for name in ("count", "total_bytes"))
        logger.info_rank0("exported to %s: %s tensors, %.2f GiB", self.output_dir, count, size / GIB)

    def _write_part(self, skeleton: Any, part: str, tensors: Tensors, partial: Path) -> SafetensorsWriter:
        directory = partial.joinpath(*part.split("."))
        directory.mkdir(parents=True, exist_ok=True)
        writer = SafetensorsWriter(directory, self.max_shard_size)
        inner = None if skeleton is None else skeleton.get_submodule(part)
        tensors = ((name.removeprefix(f"{part}."), tensor) for name, tensor in tensors)
        tensors = tensors if inner is None else _expected(inner, tensors)
        tensors = ((name, self._cast(inner, name, tensor)) for name, tensor in tensors)
        for name, tensor in tensors if inner is None else _hub_tensors(inner, tensors):
            writer.add(name, tensor)
        writer.finish()
        if hasattr(inner, "config"):
            _save_configs(inner, directory, writer.dtype)
        return writer

    def _cast(self, skeleton: nn.Module | None, name: str, tensor: Tensor) -> Tensor:
        keep = self.dtype is None or not tensor.is_floating_point()
        return tensor if keep or (skeleton is not None and keeps_fp32(skeleton, name)) else tensor.to(self.dtype)


def full_tensors(model: nn.Module, part: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer of a part (all without one), unsharded, by its name in the user's module.

    Collective: every rank must take every item. Under FSDP1 only rank 0's values are full. Tied parameters come once.
    """
    inner = unwrap(model)
    sharded = isinstance(model, FullyShardedDataParallel)
    parameters = fsdp1_parameters(model, rank0_only=True) if sharded else inner.named_parameters()
    for name, tensor in chain(parameters, inner.named_buffers()):
        if plain_name(name).startswith(f"{part}." if part else ""):
            tensor = tensor.detach()
            yield plain_name(name), tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _full_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of any module's ``state_dict``, unsharded, tied ones by each of their names; collective."""
    for name, value in get_model_state_dict(model).items():
        if isinstance(value, Tensor):
            yield name, value.full_tensor() if isinstance(value, DTensor) else value.clone()  # tied: each its own


def _on_rank_zero(write: Callable[[], object], streams: Iterable[Iterator[Any]]) -> None:
    """Run ``write``, which consumes ``streams``, on rank 0; every rank gathers all of them, or raises with it."""
    error: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            write()
        except Exception as raised:  # the other ranks are in a collective: take part to its end, then raise there too
            error = raised
    for _ in chain.from_iterable(streams):
        pass
    message = [None if error is None else f"{type(error).__name__}: {error}"]
    if dist.is_initialized():
        dist.broadcast_object_list(message, src=0)
    if error is not None:
        raise error
    if message[0] is not None:
        raise VeOmniError(f"rank 0 could not export: {message[0]}")


def _skeleton(config: PreTrainedConfig, like: Any = None, parts: Iterable[str] = ()) -> Any:
    """Build the model unwrapped on the meta device, with the generation defaults and conversions of ``like``."""
    from transformers import PreTrainedModel

    config = deepcopy(config)
    cls: Any = model_class(config)
    with torch.device("meta"):
        skeleton: Any = construct(cls, config, "eager") if issubclass(cls, PreTrainedModel) else cls(config)
    for part in parts:
        copy_conversions(like.get_submodule(part), skeleton.get_submodule(part))
    if getattr(like, "generation_config", None) is not None:
        skeleton.generation_config = like.generation_config
    return skeleton


def _expected(skeleton: nn.Module, tensors: Tensors) -> Tensors:
    """Yield the tensors of a checkpoint, each tied tensor once, and reject any that does not belong to the model."""
    state = skeleton.state_dict()
    tied = tied_parameters(skeleton)
    transient = {name for name, _ in skeleton.named_buffers()} - state.keys()
    waiting = {tied.get(name, name) for name in state}
    for name, tensor in tensors:
        if name in transient:
            continue
        if name not in state or tensor.shape != state[name].shape:
            problem = f"{name} {list(tensor.shape)} does not fit the model"
            raise ModelError(problem, "use the configuration it came from")
        if tied.get(name, name) in waiting:
            waiting.discard(tied.get(name, name))
            yield tied.get(name, name), tensor
    if waiting:
        raise ModelError(f"missing for the export: {', '.join(sorted(waiting)[:10])}", "give every tensor of the model")


def _hub_tensors(skeleton: nn.Module, tensors: Tensors) -> Tensors:
    """Convert tensors to the hub's names and shapes; those converted together are held until all are there."""
    own = [name for name in skeleton.state_dict() if name not in tied_parameters(skeleton)]
    conversions = {name: group for group in saving_conversions(skeleton, own) for name in group.names}
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        conversion = conversions[name]
        held[name] = tensor if len(conversion.names) == 1 else tensor.cpu()
        if all(other in held for other in conversion.names):
            sources = {key: [held.pop(other) for other in names] for key, names in conversion.sources.items()}
            yield from conversion.convert(skeleton, sources).items()


def _save_configs(skeleton: Any, directory: Path, dtype: torch.dtype | None) -> None:
    config = skeleton.config
    config.dtype = dtype or torch.float32
    config.architectures = [type(skeleton).__name__]
    set_config_flag(config, "use_cache", True)  # training turned it off; what is exported is to generate
    config.save_pretrained(directory)
    generation = getattr(skeleton, "generation_config", None)
    if generation is not None:
        try:
            generation.save_pretrained(directory)
        except ValueError as error:
            logger.warning_rank0("the generation config is not exported, it contradicts itself: %s", error)


@contextmanager
def _published(output_dir: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the name ``output_dir`` when the body ends, and is removed if it fails."""
    if output_dir.is_file():
        raise ModelError(f"{output_dir} is a file", "give a directory to export to")
    inside = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else []
    if "config.json" not in inside and not all(n.startswith("model") and ".safetensors" in n for n in inside):
        raise ModelError(f"{output_dir} holds something other than an export", "give another directory, or empty it")
    partial = output_dir.with_name(f".{output_dir.name}.partial-{os.getpid()}")
    previous = output_dir.with_name(f".{output_dir.name}.previous-{os.getpid()}")
    new_parents = [parent for parent in partial.parents if not parent.exists()]
    partial.mkdir(parents=True)
    try:
        yield partial
        if output_dir.exists():
            output_dir.rename(previous)
        partial.rename(output_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # another process uses one of them by now
            for parent in new_parents:
                parent.rmdir()
        raise
    shutil.rmtree(previous, ignore_errors=True)
