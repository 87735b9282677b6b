"""Constructors of modules: keep what they register off the device, or get back the values that they alone set."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.utils import deterministic

from veomni.models.transformers_api.construction import construct_again
from veomni.models.weights.slots import on_meta


@contextmanager
def registered_on_meta(keep: Callable[[nn.Module, str], bool] = lambda module, key: False) -> Iterator[None]:
    """Move each parameter and buffer that is not to ``keep`` to the meta device as soon as a module registers it.

    ``torch.device("meta")`` does not reach all that constructors call: ``torch.normal``, or tensors from numpy.
    """

    def move(module: nn.Module, key: str, value: Tensor | None) -> Any:  # torch's annotations forbid another value
        return value if value is None or value.is_meta or keep(module, key) else on_meta(value)

    parameters = registration.register_module_parameter_registration_hook(move)
    buffers = registration.register_module_buffer_registration_hook(move)
    with parameters, buffers:
        yield


def constructor_values(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Return values of a transformers model that nothing but its constructor sets, as it sets them on the CPU.

    The model is constructed once more, with nothing in memory but these values and the tensor being registered. Those
    that the class does not construct, or leaves uninitialised, are missing.
    """
    wanted = {(type(model.get_submodule(path)), key) for path, _, key in (name.rpartition(".") for name in names)}
    keep = registered_on_meta(lambda module, key: (type(module), key) in wanted)
    with torch.device("cpu"), torch.no_grad(), _uninitialised_as_nan(), keep:
        again = construct_again(model)
    made = {**dict(again.named_parameters()), **dict(again.named_buffers())}
    found = {name: made[name].detach() for name in names if name in made and not made[name].is_meta}
    return {name: value for name, value in found.items() if not value.isnan().any()}


@contextmanager
def _uninitialised_as_nan() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN."""
    flags: Any = deterministic  # its flag is a property of the module's class
    mode, fills = torch.get_deterministic_debug_mode(), flags.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    flags.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        flags.fill_uninitialized_memory = fills
