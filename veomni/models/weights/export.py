"""Models out in Hugging Face layout, streamed: the names and shapes that hub checkpoints have."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veomni.errors import ModelError, VeOmniError
from veomni.logging import create_logger
from veomni.models.loader import model_class
from veomni.models.transformers_api.capabilities import is_pretrained, keeps_fp32, set_config_flag
from veomni.models.transformers_api.construction import construct, tied_parameters
from veomni.models.transformers_api.conversions import Conversion, copy_conversions, saving_conversions
from veomni.models.weights.gather import full_tensors, unwrap
from veomni.models.weights.safetensors_writer import SafetensorsWriter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = create_logger(__name__)

GIB = 1024**3


def export_hf(
    model: nn.Module,
    output_dir: Path | str,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * GIB,
) -> Path:
    """Write a model as ``from_pretrained`` reads it; collective, rank 0 writes, one parameter is gathered at a time.

    Args:
        model: A transformers model, sharded or wrapped by any strategy.
        output_dir: Where to; an earlier export there is replaced once the new one is complete.
        tokenizer: A tokenizer or processor to save beside the weights.
        dtype: Dtype of the weights in the files; None keeps that of the parameters.
        max_shard_size: Bytes per file at most, unless a single tensor is larger.

    Raises:
        ModelError: the model has no transformers configuration, or the directory holds something else.

    A composed model is written part by part, each into a directory of its own: those that transformers knows as it
    reads them.
    """
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    if hasattr(inner, "part_names"):
        return _export_parts(model, inner, Path(output_dir), tokenizer, dtype, max_shard_size)
    if config is None or not hasattr(config, "save_pretrained"):
        raise ModelError(f"{type(inner).__name__} has no transformers configuration", "save its state_dict instead")
    tensors = full_tensors(model)
    if not dist.is_initialized():
        return _export(_skeleton(config, inner), tensors, Path(output_dir), tokenizer, dtype, max_shard_size)
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            _export(_skeleton(config, inner), tensors, Path(output_dir), tokenizer, dtype, max_shard_size)
        except Exception as raised:  # the others wait in a collective: take part to the end, then tell them
            error = raised
    for _ in tensors:
        pass
    _agree(error)
    return Path(output_dir)


def export_tensors_hf(
    config: PreTrainedConfig,
    tensors: Iterable[tuple[str, Tensor]],
    output_dir: Path | str,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * GIB,
) -> Path:
    """Write full tensors, as a checkpoint of this library holds them, in Hugging Face layout; no process group needed.

    Args:
        config: The model's configuration.
        tensors: (Name in the model, full tensor), in any order; not needed again once taken.
        output_dir: See :func:`export_hf`, as the rest.
        tokenizer: A tokenizer or processor to save beside the weights.
        dtype: Dtype of the weights in the files; None keeps that of the tensors.
        max_shard_size: Bytes per file at most, unless a single tensor is larger.

    Raises:
        ModelError: a tensor is missing, unknown or of another shape; or the directory holds something else.
    """
    return _export(_skeleton(config), tensors, Path(output_dir), tokenizer, dtype, max_shard_size)


def _skeleton(config: PreTrainedConfig, like: nn.Module | None = None) -> nn.Module:
    """Build the model on the meta device: what knows names, ties and conversions, unwrapped."""
    from transformers import PreTrainedModel

    config = deepcopy(config)
    cls: Any = model_class(config)
    with torch.device("meta"):
        skeleton = construct(cls, config, "eager") if issubclass(cls, PreTrainedModel) else cls(config)
    if like is not None:
        copy_conversions(like, skeleton)
        if getattr(like, "generation_config", None) is not None:
            skeleton.generation_config = like.generation_config
    return skeleton


def _export(
    skeleton: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    output_dir: Path,
    tokenizer: Any,
    dtype: torch.dtype | None,
    max_shard_size: int,
) -> Path:
    _refuse_foreign(output_dir)
    partial = output_dir.with_name(f".{output_dir.name}.partial-{os.getpid()}")
    new_parents = [parent for parent in partial.parents if not parent.exists()]
    partial.mkdir(parents=True)
    try:
        writer = SafetensorsWriter(partial, max_shard_size)
        for name, tensor in _hub_tensors(skeleton, _cast(skeleton, _expected(skeleton, tensors), dtype)):
            writer.add(name, tensor)
        writer.finish()
        _save_configs(skeleton, partial, writer.dtype, tokenizer)
        _replace(partial, output_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody else has begun to use one of them
            for parent in new_parents:
                parent.rmdir()
        raise
    logger.info_rank0("exported to %s: %s tensors, %.2f GiB", output_dir, writer.count, writer.total_bytes / GIB)
    return output_dir


def _export_parts(
    model: nn.Module, inner: Any, output_dir: Path, tokenizer: Any, dtype: torch.dtype | None, max_shard_size: int
) -> Path:
    error: Exception | None = None
    partial = output_dir.with_name(f".{output_dir.name}.partial-{os.getpid()}")
    writes = not dist.is_initialized() or dist.get_rank() == 0
    if writes:
        _refuse_foreign(output_dir)
    skeleton = _skeleton(inner.config) if writes else None
    for part in inner.part_names:
        tensors = full_tensors(model, part)
        if skeleton is not None and error is None:
            try:
                part_skeleton = skeleton.get_submodule(part)
                copy_conversions(inner.get_submodule(part), part_skeleton)
                _write_part(part_skeleton, part, tensors, partial, dtype, max_shard_size)
            except Exception as raised:  # the others wait in a collective: take part to the end, then tell them
                error = raised
        for _ in tensors:
            pass
    if skeleton is not None:
        error = error or _finish_parts(skeleton, partial, output_dir, tokenizer)
    if dist.is_initialized():
        _agree(error)
    elif error is not None:
        raise error
    return output_dir


def _write_part(
    skeleton: nn.Module,
    part: str,
    tensors: Iterable[tuple[str, Tensor]],
    partial: Path,
    dtype: torch.dtype | None,
    max_shard_size: int,
) -> None:
    directory = partial.joinpath(*part.split("."))
    directory.mkdir(parents=True)
    writer = SafetensorsWriter(directory, max_shard_size)
    own = ((name[len(part) + 1 :], tensor) for name, tensor in tensors)
    for name, tensor in _hub_tensors(skeleton, _cast(skeleton, _expected(skeleton, own), dtype)):
        writer.add(name, tensor)
    writer.finish()
    if hasattr(skeleton, "config"):
        _save_configs(skeleton, directory, writer.dtype, None)


def _finish_parts(skeleton: Any, partial: Path, output_dir: Path, tokenizer: Any) -> Exception | None:
    try:
        skeleton.config.architectures = [type(skeleton).__name__]
        skeleton.config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _replace(partial, output_dir)
        logger.info_rank0("exported to %s: %s", output_dir, ", ".join(skeleton.part_names))
    except Exception as error:  # told to the other ranks
        return error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return None


def _expected(skeleton: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Pass on what a checkpoint holds, each tied tensor once, and refuse what does not belong to the model."""
    state = skeleton.state_dict()
    tied = tied_parameters(skeleton)
    transient = {name for name, _ in skeleton.named_buffers()} - state.keys()
    waiting = {tied.get(name, name) for name in state}
    for name, tensor in tensors:
        if name in transient:
            continue
        if name not in state or tensor.shape != state[name].shape:
            raise ModelError(
                f"{name} {list(tensor.shape)} does not fit the model", "use the configuration it came from"
            )
        if tied.get(name, name) in waiting:
            waiting.discard(tied.get(name, name))
            yield tied.get(name, name), tensor
    if waiting:
        raise ModelError(f"missing for the export: {', '.join(sorted(waiting)[:10])}", "give every tensor of the model")


def _cast(
    skeleton: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        keep = dtype is None or not tensor.is_floating_point() or keeps_fp32(skeleton, name)
        yield name, tensor if keep else tensor.to(dtype)


def _hub_tensors(skeleton: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Convert tensors to the hub's names and shapes; those that are converted together wait for one another."""
    conversions = _conversions(skeleton)
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        conversion = conversions[name]
        held[name] = tensor if len(conversion.names) == 1 else tensor.cpu()
        if all(other in held for other in conversion.names):
            parts = {key: [held.pop(other) for other in names] for key, names in conversion.sources.items()}
            yield from conversion.convert(skeleton, parts).items()


def _conversions(skeleton: nn.Module) -> dict[str, Conversion]:
    tied = tied_parameters(skeleton)
    names = [name for name in skeleton.state_dict() if name not in tied]
    if not is_pretrained(skeleton):
        return {name: Conversion(name, {name: [name]}) for name in names}
    return {name: group for group in saving_conversions(skeleton, names) for name in group.names}


def _save_configs(skeleton: nn.Module, directory: Path, dtype: torch.dtype, tokenizer: Any) -> None:
    config: Any = skeleton.config
    config.dtype = dtype
    config.architectures = [type(skeleton).__name__]
    set_config_flag(config, "use_cache", True)  # training turned it off; what is exported is to generate
    config.save_pretrained(directory)
    generation: Any = getattr(skeleton, "generation_config", None)
    if generation is not None:
        try:
            generation.save_pretrained(directory)
        except ValueError as error:
            logger.warning_rank0("the generation config is not exported, it contradicts itself: %s", error)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _refuse_foreign(output_dir: Path) -> None:
    if output_dir.is_file():
        raise ModelError(f"{output_dir} is a file", "give a directory to export to")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not (output_dir / "config.json").is_file():
        raise ModelError(f"{output_dir} holds something other than an export", "give another directory, or empty it")


def _replace(partial: Path, output_dir: Path) -> None:
    previous = output_dir.with_name(f".{output_dir.name}.previous-{os.getpid()}")
    if output_dir.exists():
        output_dir.rename(previous)
    partial.rename(output_dir)
    shutil.rmtree(previous, ignore_errors=True)


def _agree(error: Exception | None) -> None:
    """Raise on every rank when rank 0 failed."""
    message = [None if error is None else f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(message, src=0)
    if error is not None:
        raise error
    if message[0] is not None:
        raise VeOmniError(f"rank 0 could not export: {message[0]}")
