"""States that are not sharded, without pickle: JSON, with the tensors inside them in a safetensors file beside it."""

import json
from pathlib import Path
from typing import Any

from safetensors import torch as safetensors
from torch import Tensor

from veomni.errors import CheckpointError

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"


def encoded(states: dict[str, Any]) -> dict[str, bytes]:
    """Return copies of ``states`` as the contents of two files, by suffix; CheckpointError for what is not saved."""
    tensors: dict[str, Tensor] = {}
    plain = _encode(states, "", tensors)
    return {".json": json.dumps(plain, indent=1).encode(), ".safetensors": safetensors.save(tensors)}


def read_objects(stem: Path) -> dict[str, Any]:
    """Return the states that :func:`encoded` made the files ``stem.json`` and ``stem.safetensors`` of."""
    tensors = safetensors.load(stem.with_suffix(".safetensors").read_bytes())

    def decode(entry: dict[str, Any]) -> Any:
        if entry.keys() == {_TENSOR}:
            return tensors[entry[_TENSOR]]
        return tuple(entry[_TUPLE]) if entry.keys() == {_TUPLE} else entry

    return json.loads(stem.with_suffix(".json").read_text(), object_hook=decode)


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise CheckpointError(f"the state {path or 'of the run'} has keys that are no text", "use text as keys")
        return {key: _encode(part, f"{path}.{key}" if path else key, tensors) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_encode(part, f"{path}.{index}", tensors) for index, part in enumerate(value)]
        return {_TUPLE: parts} if isinstance(value, tuple) else parts
    if value is None or isinstance(value, str | bool | int | float):
        return value
    problem = f"the state {path} holds a {type(value).__name__}, which is not saved"
    raise CheckpointError(problem, "return numbers, text, lists, dicts and tensors from state_dict()")
