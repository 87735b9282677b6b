"""A directory of safetensors: read one slice of one tensor at a time, written with at most one file in memory."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from veomni.errors import ModelError
from veomni.models.weights.slots import Box

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_AGAIN = "copy or download the model directory again"


def has_safetensors(directory: Path) -> bool:
    """Whether a model directory holds weights in safetensors."""
    return (directory / INDEX_NAME).is_file() or (directory / SINGLE_NAME).is_file()


def require_safetensors(directory: Path) -> None:
    """Raise a ModelError for a model directory without weights in safetensors, or with weights as pickle only."""
    if has_safetensors(directory):
        return
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        problem = f"{directory} has weights only as pickle ({_some(pickles)}), which can run code when it is loaded"
        raise ModelError(problem, "convert them: load with transformers where you trust the file, then save_pretrained")
    raise ModelError(f"{directory} holds no {SINGLE_NAME} and no {INDEX_NAME}", "give a directory with weights")


class SafetensorsFiles:
    """The tensors of a model directory. Files are mapped, not read: only the slices asked for come from disk.

    Without safetensors, or with a missing shard or damaged header, it is a ModelError.
    """

    def __init__(self, directory: Path) -> None:
        require_safetensors(directory)
        self.directory = directory
        self._open: dict[str, Any] = {}
        if not (directory / INDEX_NAME).is_file():
            self._file_of = dict.fromkeys(self._handle(SINGLE_NAME).keys(), SINGLE_NAME)
            return
        self._file_of = _index(directory)
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
        return handle.get_slice(name)[box] if box else handle.get_tensor(name)

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.directory / file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{self.directory / file} is damaged: {error}", _AGAIN) from error
        return self._open[file]


def _index(directory: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((directory / INDEX_NAME).read_text())["weight_map"]
        file_of = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{directory / INDEX_NAME} is damaged: {error!r}", _AGAIN) from error
    files = sorted(set(file_of.values()))
    if outside := [file for file in files if Path(file).name != file]:
        raise ModelError(f"{directory / INDEX_NAME} points outside its directory: {_some(outside)}", _AGAIN)
    if missing := [file for file in files if not (directory / file).is_file()]:
        raise ModelError(f"{directory} lacks shards that its index lists: {_some(missing)}", _AGAIN)
    return file_of


def _some(names: list[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class SafetensorsWriter:
    """Writes tensors to an empty directory, with the index that transformers reads.

    A file has at most ``max_shard_size`` bytes, unless a single tensor is larger. ``dtype`` is that of the first
    floating-point tensor; None before there was one.
    """

    def __init__(self, directory: Path, max_shard_size: int) -> None:
        self.count, self.total_bytes = 0, 0
        self.dtype: torch.dtype | None = None
        self._directory, self._limit = directory, max_shard_size
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one full tensor; it is copied to the CPU."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # a view would be written with everything it views
        if self._pending and self._pending_bytes + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self.count, self.total_bytes = self.count + 1, self.total_bytes + tensor.nbytes
        if tensor.is_floating_point() and self.dtype is None:
            self.dtype = tensor.dtype

    def finish(self) -> None:
        """Write what is left, give the files their final names and write the index if there are several."""
        self._flush()
        total = len(self._shards)
        if total == 1:
            self._file(0).rename(self._directory / SINGLE_NAME)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{total:05d}.safetensors"
            self._file(number).rename(self._directory / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def _file(self, number: int) -> Path:
        return self._directory / f"{number}.partial"

    def _flush(self) -> None:
        save_file(self._pending, self._file(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0
