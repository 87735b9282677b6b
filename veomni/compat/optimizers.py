"""PyTorch's Adam on the shards that a rank holds, and updates of them that are compiled.

Adam's update of an element reads that element's gradient and moments alone. The dispatch of sharded tensors, which
would find that out at every step, keeps the host busy for longer than the device takes for the step before it.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class OnShards(torch.optim.Adam):
    """Parameters and state stay DTensors; only the update sees what is local of them."""

    def _init_group(self, group: dict[str, Any], parameters: list[Any], gradients: list[Any], *others: Any) -> Any:
        found = super()._init_group(group, parameters, gradients, *others)
        if all(_same_shards(*pair) for pair in zip(parameters, gradients, strict=True)):
            for tensors in (parameters, gradients, *others):
                tensors[:] = local_shards(tensors)
        return found


class Adam(OnShards, torch.optim.Adam):
    """See :class:`torch.optim.Adam`."""


class AdamW(OnShards, torch.optim.AdamW):
    """See :class:`torch.optim.AdamW`."""


def on_shards(factory: Any) -> Any:
    """Return what to make an optimizer with instead of ``factory``: the class here of PyTorch's, else ``factory``."""
    if factory is torch.optim.AdamW:
        return AdamW
    return Adam if factory is torch.optim.Adam else factory


def local_shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what this rank holds of tensors that may be DTensors."""
    return [each._local_tensor if isinstance(each, DTensor) else each for each in tensors]


def gradient_like(parameter: Any) -> Tensor:
    """Return what this rank holds of the gradient of a parameter, in the shards of the parameter."""
    gradient = parameter.grad
    if not _same_shards(parameter, gradient):
        gradient = gradient.redistribute(placements=parameter.placements)
    return local_shards([gradient])[0]


def compiled_for_each_shape(function: Callable[..., None]) -> Callable[..., None]:
    """Return ``function`` compiled into one static graph for each set of argument shapes, without a limit on graphs."""
    from torch._dynamo.utils import disable_cache_limit

    graphs = _compiled(function)

    def run(*args: Any, **kwargs: Any) -> None:
        with disable_cache_limit():
            graphs(*args, **kwargs)

    return run


@cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _same_shards(parameter: nn.Parameter, gradient: Tensor) -> bool:
    if not isinstance(parameter, DTensor):
        return True
    return isinstance(gradient, DTensor) and gradient.placements == parameter.placements
