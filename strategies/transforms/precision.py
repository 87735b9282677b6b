"""Which number formats a run uses, chosen by one name, and the transform that makes a model compute in them."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from veomni.batch.forward_call import ForwardCall
from veomni.errors import ConfigError
from veomni.models.adapter import adapter as adapters
from veomni.registry import did_you_mean
from veomni.strategies.base import SetupContext, Stage, Strategy
from veomni.strategies.transforms.float64 import Float64Throughout


@dataclasses.dataclass(frozen=True)
class Precision:
    """Number formats of a run.

    Attributes:
        name: What a configuration calls it.
        storage: Master weights, gradients as the optimizer sees them, optimizer state.
        compute: Matrix products and activations.
        reduce: Gradient reduction between ranks.
    """

    name: str
    storage: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype

    @property
    def mixed(self) -> bool:
        """Whether compute differs from storage."""
        return self.compute is not self.storage


PRECISIONS = {
    "fp64": Precision("fp64", torch.float64, torch.float64, torch.float64),
    "fp32": Precision("fp32", torch.float32, torch.float32, torch.float32),
    "bf16": Precision("bf16", torch.float32, torch.bfloat16, torch.float32),
}


def select_precision(name: str, *, reduce: str = "fp32") -> Precision:
    """Return the precision "fp64", "fp32" or "bf16" (another name is a ConfigError).

    The last may ``reduce`` gradients in bf16, for half the traffic.
    """
    if name in ("fp16", "float16", "half"):
        raise ConfigError(f"{name} is not supported", "use bf16, which needs no loss scaling", "Launcher.precision")
    if name not in PRECISIONS:
        raise ConfigError(f"no precision is called {name!r}", did_you_mean(str(name), list(PRECISIONS)))
    chosen = PRECISIONS[name]
    return dataclasses.replace(chosen, reduce=torch.bfloat16) if chosen.mixed and reduce == "bf16" else chosen


class ComputePrecision(Strategy):
    """Run forwards in the precision of the run.

    fp64 keeps float64 throughout. bf16 runs under autocast unless parameters are cast (FSDP does), and returns outputs
    in float32, so that no loss is computed in bf16; unless the model's loss is the library's, which is float32.
    """

    name = "compute_precision"
    stage = Stage.PRECISION

    @override
    def transform(self, adapter: adapters.ModelAdapter, context: SetupContext) -> None:
        precision, device_type = context.precision, context.device.type
        if precision.name == "fp64":
            adapter.add(_Within(Float64Throughout))
        if precision.mixed and not context.parameters.casts_parameters:
            adapter.add(_Within(lambda: torch.autocast(device_type, dtype=precision.compute)))
        if precision.mixed and adapter.loss is None:
            adapter.add(_Float32Outputs())


class _Within(adapters.InputPass):
    """Runs a forward within a context."""

    stage = adapters.Stage.PRECISION

    def __init__(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self.context = context
        self.entered: list[AbstractContextManager[Any]] = []

    def before(self, call: ForwardCall) -> None:
        self.entered.append(self.context())
        self.entered[-1].__enter__()

    def close(self, call: ForwardCall) -> None:
        if self.entered:
            self.entered.pop().__exit__(None, None, None)


class _Float32Outputs(adapters.InputPass):
    """Returns the floating tensors of a model's output, in any collection, in float32."""

    stage = adapters.Stage.PRECISION

    def after(self, call: ForwardCall, output: Any) -> Any:
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
