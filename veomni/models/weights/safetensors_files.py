"""A directory of safetensors, read one slice of one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from veomni.errors import ModelError
from veomni.models.weights.shards import Box

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def has_safetensors(directory: Path) -> bool:
    """Whether a model directory holds weights in safetensors."""
    return (directory / INDEX_NAME).is_file() or (directory / SINGLE_NAME).is_file()


class SafetensorsFiles:
    """The tensors of a model directory. Files are mapped, not read: only the slices asked for come from disk.

    Args:
        directory: Holds ``model.safetensors``, or ``model.safetensors.index.json`` and the shards it lists.

    Raises:
        ModelError: there are no safetensors, a listed shard is missing, or a file's header is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of = _index(directory)
        self._open: dict[str, Any] = {}
        present = {file: set(self._handle(file).keys()) for file in sorted(set(self._file_of.values()))}
        lost = sorted(name for name, file in self._file_of.items() if name not in present[file])
        if lost:
            raise ModelError(f"{directory} lists {_some(lost)} in {INDEX_NAME}, but its shards lack them", _AGAIN)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from its file's header."""
        return tuple(self._handle(self._file_of[name]).get_slice(name).get_shape())

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """Return a tensor on the CPU in its stored dtype, or its part ``box``."""
        handle = self._handle(self._file_of[name])
        tensor: Tensor = handle.get_slice(name)[box] if box else handle.get_tensor(name)
        return tensor

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            from safetensors import SafetensorError, safe_open

            try:
                self._open[file] = safe_open(self.directory / file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{self.directory / file} is damaged: {error}", _AGAIN) from error
        return self._open[file]


_AGAIN = "copy or download the model directory again"


def _index(directory: Path) -> dict[str, str]:
    if (directory / INDEX_NAME).is_file():
        return _sharded_index(directory)
    if (directory / SINGLE_NAME).is_file():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(directory / SINGLE_NAME, framework="pt") as file:
                return dict.fromkeys(file.keys(), SINGLE_NAME)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{directory / SINGLE_NAME} is damaged: {error}", _AGAIN) from error
    require_safetensors(directory)
    return {}


def require_safetensors(directory: Path) -> None:
    """Raise the ModelError that fits a model directory without safetensors."""
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        raise ModelError(
            f"{directory} has weights only as pickle ({_some(pickles)}), which can run code when it is loaded",
            "convert them: load with transformers where you trust the file, then save_pretrained",
        )
    raise ModelError(f"{directory} holds no {SINGLE_NAME} and no {INDEX_NAME}", "give a directory with weights")


def _sharded_index(directory: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((directory / INDEX_NAME).read_text())["weight_map"]
        file_of = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{directory / INDEX_NAME} is damaged: {error!r}", _AGAIN) from error
    outside = sorted(file for file in set(file_of.values()) if Path(file).name != file)
    if outside:
        raise ModelError(f"{directory / INDEX_NAME} points outside its directory: {_some(outside)}", _AGAIN)
    missing = sorted(file for file in set(file_of.values()) if not (directory / file).is_file())
    if missing:
        raise ModelError(f"{directory} lacks shards that its index lists: {_some(missing)}", _AGAIN)
    return file_of


def _some(names: list[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
