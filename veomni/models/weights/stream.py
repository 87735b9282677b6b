"""Weights from safetensors into parameters, one at a time, each rank reading what it holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veomni.errors import ModelError
from veomni.logging import create_logger
from veomni.models.transformers_api.capabilities import is_pretrained
from veomni.models.transformers_api.construction import tied_parameters
from veomni.models.transformers_api.conversions import (
    Conversion,
    copy_conversions,
    ignored_missing,
    ignored_unexpected,
    loading_conversions,
)
from veomni.models.weights.safetensors_files import SafetensorsFiles
from veomni.models.weights.shards import Box, copy_into, is_empty, local_box

logger = create_logger(__name__)


@dataclass
class _Target:
    shape: tuple[int, ...]
    conversion: Conversion


class WeightStream:
    """Where in a checkpoint the values of every parameter of a model are.

    Args:
        skeleton: A copy of the model on the meta device, never sharded or wrapped.
        files: The checkpoint.

    Raises:
        ModelError: the checkpoint lacks parameters, has others, or has them in other shapes.
    """

    def __init__(self, skeleton: nn.Module, files: SafetensorsFiles) -> None:
        self._skeleton, self._files = skeleton, files
        self._targets: dict[str, _Target] = {}
        for conversion in _conversions(skeleton, files.names):
            for name, shape in self._outcome(conversion).items():
                self._targets[name] = _Target(shape, conversion)
        self._aliases = _aliases(skeleton)
        self._check()

    def provides(self, name: str) -> bool:
        """Whether the checkpoint has values for a parameter or buffer, under its name or one it is tied to."""
        return self._source(name) is not None

    def fill(self, tensors: dict[str, Tensor], send: Callable[[Tensor | None, Tensor], Tensor] | None = None) -> None:
        """Copy the values of the named tensors into them.

        Args:
            tensors: Parameters and buffers with storage, sharded or not, for which :meth:`provides` is true.
            send: For broadcasting: given the full value (on the rank that reads) and the tensor, returns the full
                value on every rank. None: every rank reads its own part.
        """
        wanted = {self._source(name) or name: tensor for name, tensor in tensors.items()}
        for name, tensor in wanted.items():
            box = local_box(tensor)
            if send is not None:
                full = self._read_tied(name, _whole(tensor.shape)) if dist.get_rank() == 0 else None
                copy_into(tensor, send(full, tensor)[box])
            elif not is_empty(box):
                copy_into(tensor, self._read_tied(name, box))

    def copy_conversions(self, model: nn.Module) -> None:
        """Let ``model`` be saved as the checkpoint was read."""
        copy_conversions(self._skeleton, model)

    def _source(self, name: str) -> str | None:
        return next((alias for alias in self._aliases.get(name, [name]) if alias in self._targets), None)

    def _read(self, name: str, box: Box) -> Tensor:
        conversion = self._targets[name].conversion
        if conversion.converter is None:
            return self._files.read(conversion.names[0], box)
        rows = slice(None)
        if conversion.stacks_rows:
            rows, box = box[0], (slice(None), *box[1:])
        tensors = {key: [self._files.read(n) for n in names[rows]] for key, names in conversion.sources.items()}
        return conversion.convert(self._skeleton, tensors)[name][box]

    def _read_tied(self, name: str, box: Box) -> Tensor:
        """Read a parameter, and check that those tied to it have the same values."""
        value = self._read(name, box)
        for other in self._aliases.get(name, []):
            if other != name and other in self._targets and not torch.equal(self._read(other, box), value):
                raise ModelError(
                    f"{self._files.directory}: {name} and {other} differ, but the configuration ties them",
                    "set tie_word_embeddings to false in its config.json",
                )
        return value

    def _outcome(self, conversion: Conversion) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what a conversion makes, found by running it on the meta device."""
        tensors = {
            key: [torch.empty(self._files.shape(name), device="meta") for name in names]
            for key, names in conversion.sources.items()
        }
        try:
            made = conversion.convert(self._skeleton, tensors)
        except Exception as error:  # whatever transformers' operations raise on tensors that do not fit together
            raise ModelError(
                f"{self._files.directory}: {conversion.names[0]} does not convert to {conversion.key}: {error}",
                "the weights do not belong to this configuration, or tensors are missing",
            ) from error
        return {name: tuple(value.shape) for name, value in made.items()}

    def _check(self) -> None:
        state = self._skeleton.state_dict()
        buffers = dict(self._skeleton.named_buffers(remove_duplicate=False))
        missing = [name for name in state if name not in buffers and not self.provides(name)]
        missing = _without(missing, ignored_missing(self._skeleton))
        unused = [name for name in self._targets if name not in state]
        unexpected = _without(unused, ignored_unexpected(self._skeleton))
        wrong = [
            f"{name} (file {list(target.shape)}, model {list(state[name].shape)})"
            for name, target in self._targets.items()
            if name in state and target.shape != tuple(state[name].shape)
        ]
        found = (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        problems = [f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in found if names]
        if problems:
            raise ModelError(
                f"{self._files.directory} does not fit the model: {'; '.join(problems)}",
                "use the config.json that belongs to the weights, or weights 'random'",
            )
        if unused:
            logger.info_rank0("%s weights that this model has no use for are not loaded: %s", len(unused), unused[:5])


def _conversions(skeleton: nn.Module, names: Sequence[str]) -> list[Conversion]:
    if is_pretrained(skeleton):
        return loading_conversions(skeleton, names)
    return [Conversion(name, {name: [name]}) for name in names]


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """For every name of a tied tensor, all its names; the one that the others are tied to comes first."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(tensor), []).append(name)
    tied = tied_parameters(model)
    return {
        name: sorted(names, key=lambda alias: alias in tied)
        for names in groups.values()
        if len(names) > 1
        for name in names
    }


def _without(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def _whole(shape: torch.Size) -> Box:
    return tuple(slice(0, size) for size in shape)


def broadcast_from_zero(group: dist.ProcessGroup) -> Callable[[Tensor | None, Tensor], Tensor]:
    """Return a ``send`` for :meth:`WeightStream.fill` that broadcasts full tensors from global rank 0."""

    def send(full: Tensor | None, tensor: Tensor) -> Tensor:
        if full is None:
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        else:
            value = full.to(tensor.device, tensor.dtype).contiguous()
        dist.broadcast(value, src=0, group=group)
        return value

    return send
