"""The full tensors of a model in any layout, one parameter (or one FSDP1 unit) at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from veomni.parallel.wrappers import fsdp1_parameters, plain_name, unwrap


def full_tensors(model: nn.Module, part: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer of a part (all without one), unsharded, by its name in the user's module.

    Collective: every rank has to take every item. Under FSDP1 only rank 0's values are full. Tied parameters come once.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    inside = f"{part}." if part else ""
    if isinstance(model, FullyShardedDataParallel):
        for name, parameter in fsdp1_parameters(model, rank0_only=True):
            if name.startswith(inside):
                yield name, whole(parameter)
    else:
        for name, parameter in unwrap(model).named_parameters():
            if not plain_name(name).startswith(inside):
                continue
            yield plain_name(name), whole(parameter)
    for name, buffer in unwrap(model).named_buffers():
        if plain_name(name).startswith(inside):
            yield plain_name(name), buffer


def full_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of any module's ``state_dict``, unsharded, tied ones by each of their names; collective."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.tensor import DTensor

    for name, value in get_model_state_dict(model).items():
        if isinstance(value, Tensor):
            yield name, value.full_tensor() if isinstance(value, DTensor) else value.clone()  # tied: each its own


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be a DTensor, outside of any graph; collective."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
