"""States that are not sharded, without pickle: JSON, with the tensors inside them in a safetensors file beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from veomni.errors import CheckpointError

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"


def write_objects(stem: Path, states: dict[str, Any]) -> list[Path]:
    """Write ``stem.json`` and ``stem.safetensors`` durably, and return both paths.

    Raises:
        CheckpointError: a state holds something that is neither JSON nor a tensor.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    plain = _encode(states, "", tensors)
    contents = {
        stem.with_suffix(".json"): json.dumps(plain, indent=1).encode(),
        stem.with_suffix(".safetensors"): save(tensors),
    }
    for path, content in contents.items():
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return list(contents)


def read_objects(stem: Path) -> dict[str, Any]:
    """Return what :func:`write_objects` wrote."""
    from safetensors.torch import load

    tensors = load(stem.with_suffix(".safetensors").read_bytes())
    states: dict[str, Any] = _decode(json.loads(stem.with_suffix(".json").read_text()), tensors)
    return states


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise CheckpointError(f"the state {path or 'of the run'} has keys that are no text", "use text as keys")
        return {key: _encode(part, f"{path}.{key}" if path else key, tensors) for key, part in value.items()}
    if isinstance(value, tuple):
        return {_TUPLE: [_encode(part, f"{path}.{index}", tensors) for index, part in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(part, f"{path}.{index}", tensors) for index, part in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise CheckpointError(
        f"the state {path} holds a {type(value).__name__}, which is not saved",
        "return numbers, text, lists, dicts and tensors from state_dict()",
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return tensors[value[_TENSOR]]
    if value.keys() == {_TUPLE}:
        return tuple(_decode(part, tensors) for part in value[_TUPLE])
    return {key: _decode(part, tensors) for key, part in value.items()}
