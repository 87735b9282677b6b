"""Weights out, streamed: of transformers models in Hugging Face layout, of any other module by its own names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veomni.errors import ModelError
from veomni.logging import create_logger
from veomni.models.loader import model_class
from veomni.models.transformers_api.capabilities import is_pretrained, keeps_fp32, set_config_flag
from veomni.models.transformers_api.construction import construct, tied_parameters
from veomni.models.transformers_api.conversions import Conversion, copy_conversions, saving_conversions
from veomni.models.weights.export_directory import published, raise_on_all
from veomni.models.weights.gather import full_state, full_tensors
from veomni.models.weights.safetensors_writer import SafetensorsWriter
from veomni.parallel.wrappers import unwrap

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
    """Write a model's weights; collective, rank 0 writes, one parameter is gathered at a time.

    A transformers model is written as ``from_pretrained`` reads it; a composed model component by component, each into
    a directory of its own; any other module as ``model.safetensors``, by the names of its ``state_dict``.

    Args:
        model: Any module, sharded or wrapped by any strategy.
        output_dir: Where to; an earlier export there is replaced once the new one is complete.
        tokenizer: A tokenizer or processor to save beside the weights.
        dtype: Dtype of the weights in the files; None keeps that of the parameters.
        max_shard_size: Bytes per file at most, unless a single tensor is larger.

    Raises:
        ModelError: the directory holds something else.
    """
    inner, output_dir = unwrap(model), Path(output_dir)
    names = getattr(inner, "component_names", None)
    if names is not None:
        parts = {name: full_tensors(model, name) for name in names}
        _write_on_rank_zero(parts, lambda: _export_parts(inner, parts, output_dir, tokenizer, dtype, max_shard_size))
        return output_dir
    config: Any = getattr(inner, "config", None)
    known = hasattr(config, "save_pretrained")
    tensors = full_tensors(model) if known else full_state(model)

    def write() -> None:
        skeleton = _skeleton(config, inner) if known else None
        _export(skeleton, tensors, output_dir, tokenizer, dtype, max_shard_size)

    _write_on_rank_zero({"": tensors}, write)
    return output_dir


def _write_on_rank_zero(streams: Mapping[str, Iterator[Any]], write: Callable[[], object]) -> None:
    """Run ``write``, which consumes ``streams``, on rank 0; every rank takes part in gathering all of them."""
    error: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            write()
        except Exception as raised:  # the other ranks are in a collective: take part to its end, then raise there too
            error = raised
    for tensors in streams.values():
        for _ in tensors:
            pass
    raise_on_all(error)


def export_tensors(
    config: PreTrainedConfig | None,
    tensors: Iterable[tuple[str, Tensor]],
    output_dir: Path | str,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * GIB,
) -> Path:
    """Write full tensors, as a checkpoint holds them, as :func:`export_hf` does; no process group is needed.

    Args:
        config: The model's configuration; None writes the tensors by their names.
        tensors: (Name in the model, full tensor), in any order; not needed again once taken.
        output_dir: See :func:`export_hf`, as the rest.
        tokenizer: A tokenizer or processor to save beside the weights.
        dtype: Dtype of the weights in the files; None keeps that of the tensors.
        max_shard_size: Bytes per file at most, unless a single tensor is larger.

    Raises:
        ModelError: a tensor is missing, unknown or of another shape; or the directory holds something else.
    """
    skeleton = None if config is None else _skeleton(config)
    return _export(skeleton, tensors, Path(output_dir), tokenizer, dtype, max_shard_size)


def _skeleton(config: PreTrainedConfig, like: nn.Module | None = None) -> nn.Module:
    """Build the model on the meta device: the source of names, ties and conversions, unwrapped."""
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
    skeleton: nn.Module | None,
    tensors: Iterable[tuple[str, Tensor]],
    output_dir: Path,
    tokenizer: Any,
    dtype: torch.dtype | None,
    max_shard_size: int,
) -> Path:
    with published(output_dir) as partial:
        writer = SafetensorsWriter(partial, max_shard_size)
        for name, tensor in _written(skeleton, tensors, dtype):
            writer.add(name, tensor)
        writer.finish()
        if skeleton is not None:
            _save_configs(skeleton, partial, writer.dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    logger.info_rank0("exported to %s: %s tensors, %.2f GiB", output_dir, writer.count, writer.total_bytes / GIB)
    return output_dir


def _written(
    skeleton: nn.Module | None, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield what goes into the files: the hub's tensors of a known architecture, else those of the module."""
    if skeleton is not None:
        return _hub_tensors(skeleton, _cast(skeleton, _expected(skeleton, tensors), dtype))
    return ((name, tensor.to(dtype) if tensor.is_floating_point() else tensor) for name, tensor in tensors)


def _export_parts(
    inner: Any,
    streams: Mapping[str, Iterator[tuple[str, Tensor]]],
    output_dir: Path,
    tokenizer: Any,
    dtype: torch.dtype | None,
    max_shard_size: int,
) -> None:
    skeleton: Any = _skeleton(inner.config)
    with published(output_dir) as partial:
        for part, tensors in streams.items():
            part_skeleton = skeleton.get_submodule(part)
            copy_conversions(inner.get_submodule(part), part_skeleton)
            _write_part(part_skeleton, part, tensors, partial, dtype, max_shard_size)
        skeleton.config.architectures = [type(skeleton).__name__]
        skeleton.config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    logger.info_rank0("exported to %s: %s", output_dir, ", ".join(streams))


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
        _save_configs(skeleton, directory, writer.dtype)


def _expected(skeleton: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint, each tied tensor once, and reject any that does not belong to the model."""
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
    """Convert tensors to the hub's names and shapes; those converted together are held until all are there."""
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


def _save_configs(skeleton: nn.Module, directory: Path, dtype: torch.dtype) -> None:
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
