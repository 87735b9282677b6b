"""Weights of a composed model, each part's from a directory of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from veomni.models.transformers_api.conversions import copy_conversions
from veomni.models.weights.safetensors_files import SafetensorsFiles
from veomni.models.weights.stream import WeightStream


class PartStreams:
    """A :class:`~veomni.models.weights.stream.WeightStream` for every part, behind the interface of one.

    Args:
        skeleton: A copy of the whole model on the meta device.
        parts: Names of parts, as modules, to directories with their safetensors.

    Raises:
        ModelError: the weights of a part do not fit it.
    """

    def __init__(self, skeleton: nn.Module, parts: Mapping[str, Path]) -> None:
        self._skeleton = skeleton
        self._streams = {
            name: WeightStream(skeleton.get_submodule(name), SafetensorsFiles(path)) for name, path in parts.items()
        }

    def provides(self, name: str) -> bool:
        """Whether a part's checkpoint has values for a parameter or buffer of the whole model."""
        part = self._part_of(name)
        return part is not None and self._streams[part].provides(name[len(part) + 1 :])

    def fill(self, tensors: dict[str, Tensor], send: Callable[[Tensor | None, Tensor], Tensor] | None = None) -> None:
        """Copy the values of the named tensors into them; see :meth:`WeightStream.fill`."""
        by_part: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            part = self._part_of(name)
            assert part is not None
            by_part[part][name[len(part) + 1 :]] = tensor
        for part, inner in by_part.items():
            self._streams[part].fill(inner, send)

    def copy_conversions(self, model: nn.Module) -> None:
        """Let the parts of ``model`` be saved as they were read."""
        for part in self._streams:
            copy_conversions(self._skeleton.get_submodule(part), model.get_submodule(part))

    def _part_of(self, name: str) -> str | None:
        return next((part for part in self._streams if name.startswith(f"{part}.")), None)
