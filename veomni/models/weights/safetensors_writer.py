"""Tensors into safetensors files of bounded size, with the index that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from veomni.models.weights.safetensors_files import INDEX_NAME, SINGLE_NAME


class SafetensorsWriter:
    """Holds at most one file's worth of tensors.

    Args:
        directory: Where to; exists and is empty.
        max_shard_size: Bytes per file at most, unless a single tensor is larger.

    Attributes:
        count: Tensors written.
        total_bytes: Their size.
        dtype: Dtype of the first floating-point tensor; float32 before there was one.
    """

    def __init__(self, directory: Path, max_shard_size: int) -> None:
        self.count, self.total_bytes, self.dtype = 0, 0, torch.float32
        self._directory, self._limit = directory, max_shard_size
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._has_dtype = False

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
        if tensor.is_floating_point() and not self._has_dtype:
            self.dtype, self._has_dtype = tensor.dtype, True

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
        from safetensors.torch import save_file

        save_file(self._pending, self._file(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0
