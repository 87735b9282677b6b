"""Weights from safetensors into parameters, one at a time, each rank reading what it holds."""

import re
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veomni.errors import ModelError
from veomni.logging import create_logger
from veomni.models.transformers_api import conversions
from veomni.models.transformers_api.construction import tied_parameters
from veomni.models.weights.safetensors_files import SafetensorsFiles
from veomni.models.weights.slots import Box, copy_into, local_box, tied_names, whole_box

logger = create_logger(__name__)


class WeightStream:
    """Where in a checkpoint the values of every parameter of a model are; a ModelError where the two do not fit.

    The ``skeleton`` is a copy of the model on the meta device, never sharded or wrapped.
    """

    def __init__(self, skeleton: nn.Module, files: SafetensorsFiles) -> None:
        self._skeleton, self._files = skeleton, files
        self._conversions: dict[str, conversions.Conversion] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for conversion in conversions.loading_conversions(skeleton, files.names):
            made = self._outcome(conversion)
            shapes |= made
            self._conversions |= dict.fromkeys(made, conversion)
        tied = tied_parameters(skeleton)
        self._aliases = {
            name: sorted(names, key=lambda alias: alias in tied) for name, names in tied_names(skeleton).items()
        }
        self._check(shapes)

    def provides(self, name: str) -> bool:
        """Whether the checkpoint has values for a parameter or buffer, under its name or one it is tied to."""
        return self._source(name) is not None

    def fill(self, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
        """Copy the values of the named tensors, sharded or not, for which :meth:`provides` is true, into them.

        With a ``group``, rank 0 reads each tensor and broadcasts it; otherwise every rank reads its own part.
        """
        wanted = {self._source(name) or name: tensor for name, tensor in tensors.items()}
        for name, tensor in wanted.items():
            box = local_box(tensor)
            if group is not None:
                copy_into(tensor, self._broadcast(name, tensor, group)[box])
            elif all(part.start < part.stop for part in box):
                copy_into(tensor, self._read_tied(name, box))

    def _source(self, name: str) -> str | None:
        return next((alias for alias in self._aliases.get(name, [name]) if alias in self._conversions), None)

    def _broadcast(self, name: str, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if dist.get_rank() == 0:
            value.copy_(self._read_tied(name, whole_box(tensor.shape)))
        dist.broadcast(value, src=0, group=group)
        return value

    def _read_tied(self, name: str, box: Box) -> Tensor:
        """Read a parameter, and check that those tied to it have the same values."""
        value = self._read(name, box)
        for other in self._aliases.get(name, []):
            if other != name and other in self._conversions and not torch.equal(self._read(other, box), value):
                problem = f"{self._files.directory}: {name} and {other} differ, but the configuration ties them"
                raise ModelError(problem, "set tie_word_embeddings to false in its config.json")
        return value

    def _read(self, name: str, box: Box) -> Tensor:
        conversion = self._conversions[name]
        if conversion.converter is None:
            return self._files.read(conversion.names[0], box)
        rows = slice(None)
        if conversion.stacks_rows:
            rows, box = box[0], (slice(None), *box[1:])
        tensors = {key: [self._files.read(n) for n in names[rows]] for key, names in conversion.sources.items()}
        return conversion.convert(self._skeleton, tensors)[name][box]

    def _outcome(self, conversion: conversions.Conversion) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of what a conversion makes, found by running it on the meta device."""
        tensors = {
            key: [torch.empty(self._files.shape(name), device="meta") for name in names]
            for key, names in conversion.sources.items()
        }
        try:
            made = conversion.convert(self._skeleton, tensors)
        except Exception as error:  # whatever transformers' operations raise on tensors that do not fit together
            problem = f"{self._files.directory}: {conversion.names[0]} does not convert to {conversion.key}: {error}"
            fix = "the weights do not belong to this configuration, or tensors are missing"
            raise ModelError(problem, fix) from error
        return {name: tuple(value.shape) for name, value in made.items()}

    def _check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        state = self._skeleton.state_dict()
        buffers = dict(self._skeleton.named_buffers(remove_duplicate=False))
        missing = [name for name in state if name not in buffers and not self.provides(name)]
        unused = [name for name in shapes if name not in state]
        wrong = [
            f"{name} (file {list(shape)}, model {list(state[name].shape)})"
            for name, shape in shapes.items()
            if name in state and shape != tuple(state[name].shape)
        ]
        found = {
            "missing": _without(missing, conversions.ignored_missing(self._skeleton)),
            "unexpected": _without(unused, conversions.ignored_unexpected(self._skeleton)),
            "of another shape": wrong,
        }
        problems = [f"{len(names)} {problem}: {', '.join(names[:5])}" for problem, names in found.items() if names]
        if problems:
            problem = f"{self._files.directory} does not fit the model: {'; '.join(problems)}"
            raise ModelError(problem, "use the config.json that belongs to the weights, or weights 'random'")
        if unused:
            logger.info_rank0("%s weights that this model has no use for are not loaded: %s", len(unused), unused[:5])


def _without(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]
