"""The full tensors of a model in any layout, one parameter (or one FSDP1 unit) at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

_FSDP1 = "_fsdp_wrapped_module."
_OTHER_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside DistributedDataParallel and FullyShardedDataParallel."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    while isinstance(model, DistributedDataParallel | FullyShardedDataParallel):
        model = model.module
    return model


def full_tensors(model: nn.Module, part: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer of a part (all without one), unsharded, by its name in the user's module.

    Collective: every rank has to take every item. Under FSDP1 only rank 0's values are full. Tied parameters come once.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    inside = f"{part}." if part else ""
    if isinstance(model, FullyShardedDataParallel):
        for name, tensor in _fsdp1_parameters(model):
            if name.startswith(inside):
                yield name, tensor
    else:
        for name, parameter in unwrap(model).named_parameters():
            if not plain_name(name).startswith(inside):
                continue
            tensor = parameter.detach()
            yield plain_name(name), tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
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


def plain_name(name: str) -> str:
    """Return a parameter's name without what wrappers of modules put into it."""
    for wrapper in (_FSDP1, *_OTHER_WRAPPERS):
        name = name.replace(wrapper, "")
    return name


def _fsdp1_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    for path, unit in list(model.named_modules()):
        if not isinstance(unit, FullyShardedDataParallel):
            continue
        with (
            torch.no_grad(),
            FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False, rank0_only=True),
        ):
            for name, parameter in unit.module.named_parameters():
                if _FSDP1 not in name:  # the others belong to units inside this one
                    tensor = parameter.detach()
                    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # experts are not flattened
                    yield plain_name(f"{path}.{name}" if path else name), whole
