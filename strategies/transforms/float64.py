"""Forwards that compute in float64 throughout: what every exact comparison between layouts runs in."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from veomni.compat.tensors import TorchDispatchMode


class _SamplingPlaces(TorchFunctionMode):
    """Give ``grid_sample``, which takes one format only, its places in that of what it samples, not in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.grid_sample:
            args = (args[0], args[1].to(args[0].dtype), *args[2:])
        return func(*args, **(kwargs or {}))


class Float64Throughout(TorchDispatchMode):
    """Keep float64 where modeling code names float32 (norms, softmax, rotary tables, sums), or no dtype at all.

    Without it an fp64 run still rounds to float32 in every norm, and gradients agree between layouts to 1e-7 only.
    """

    depth = 0

    def __enter__(self) -> Self:
        Float64Throughout.depth += 1
        self._places, self._default = _SamplingPlaces(), torch.get_default_dtype()
        self._places.__enter__()
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
        first = args[0] if args else None
        if kwargs.get("dtype") is torch.float32 and isinstance(first, Tensor) and first.dtype is torch.float64:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def keep_float64(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``forward`` bound to the mode it is called in now, for a recomputation that runs outside of it."""
    if not Float64Throughout.depth:
        return forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with Float64Throughout():
            return forward(*args, **kwargs)

    return run
