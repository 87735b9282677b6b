"""The dtype that a forward computes in, where it differs from the dtype of storage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from veomni.batch.forward_call import ForwardCall
from veomni.compat.tensors import TorchDispatchMode
from veomni.models.adapter.adapter import InputPass, ModelAdapter, Stage
from veomni.strategies.transforms.precision import Precision


class _SamplingPlaces(TorchFunctionMode):
    """Give ``grid_sample`` its places in the format of what it samples.

    Modeling code makes them in float32, from whole numbers, and the function takes one format only.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.grid_sample:
            args = (args[0], args[1].to(args[0].dtype), *args[2:])
        return func(*args, **(kwargs or {}))


class Float64Throughout(TorchDispatchMode):
    """Keep float64 where modeling code names float32 (norms, softmax, rotary tables, sums), or no dtype at all.

    Without it an fp64 run still rounds to float32 in every norm, and gradients agree between layouts to 1e-7 only.
    """

    depth = 0

    def __init__(self) -> None:
        super().__init__()
        self._places = _SamplingPlaces()
        self._default = torch.get_default_dtype()

    def __enter__(self) -> Self:
        Float64Throughout.depth += 1
        self._places.__enter__()
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        Float64Throughout.depth -= 1
        torch.set_default_dtype(self._default)
        self._places.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32 and _is_float64(args):
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def _is_float64(args: Any) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].dtype is torch.float64


def keep_float64(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``forward`` bound to the mode it is called in now, for a recomputation that runs outside of it."""
    if not Float64Throughout.depth:
        return forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with Float64Throughout():
            return forward(*args, **kwargs)

    return run


def compute_in(adapter: ModelAdapter, precision: Precision, device_type: str, *, autocast: bool) -> None:
    """Run a model's forward in ``precision``.

    Args:
        adapter: The adapter of the model.
        precision: fp64 keeps float64 throughout. bf16 runs under autocast when ``autocast`` is set, and returns outputs
            in float32, so that no loss is computed in bf16; unless the model's loss is the library's, which is float32.
        device_type: Device type of the autocast.
        autocast: Whether the caller's wrapper leaves casting to autocast (FSDP casts parameters itself).
    """
    if precision.name == "fp64":
        adapter.add(_Within(Float64Throughout))
    if precision.mixed and autocast:
        adapter.add(_Within(lambda: torch.autocast(device_type, dtype=precision.compute)))
    if precision.mixed and adapter.loss is None:
        adapter.add(Float32Outputs())


class _Within(InputPass):
    """Runs a forward within a context."""

    stage = Stage.PRECISION

    def __init__(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self.context = context
        self.entered: list[AbstractContextManager[Any]] = []

    def before(self, call: ForwardCall) -> None:
        context = self.context()
        context.__enter__()
        self.entered.append(context)

    def close(self, call: ForwardCall) -> None:
        if self.entered:
            self.entered.pop().__exit__(None, None, None)


class Float32Outputs(InputPass):
    """Returns the floating tensors of a model's output in float32."""

    stage = Stage.PRECISION

    def after(self, call: ForwardCall, output: Any) -> Any:
        """Cast tensors in tuples, lists, mappings and dataclasses too."""
        return _float32(output)


def _float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    if isinstance(value, dict):  # transformers' outputs among them
        for name, part in list(value.items()):
            value[name] = _float32(part)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_float32(part) for part in value))
    elif isinstance(value, list | tuple):
        return type(value)(_float32(part) for part in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.init}
        return dataclasses.replace(value, **{name: _float32(part) for name, part in parts.items()})
    return value
