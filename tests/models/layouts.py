"""Models in the layouts that strategies put them in, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from veomni.models import Materializer, build_model, derive_plan

CPU = torch.device("cpu")


def materialized(source: Any, seed: int = 1, **options: Any) -> Any:
    """Return a model with values, in one process."""
    model = build_model(source, **options)
    Materializer(model, device=CPU, seed=seed)(model)
    return model


def fsdp2(source: Any, *, replicate: int = 1, dtype: torch.dtype | None = None, broadcast: bool = False) -> nn.Module:
    """Return a model sharded over all ranks of the process group, materialised from meta."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shape = (dist.get_world_size(),) if replicate == 1 else (replicate, dist.get_world_size() // replicate)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    model = build_model(source)
    for parameter in model.parameters() if dtype else ():
        parameter.data = parameter.data.to(dtype)
    group = dist.group.WORLD if broadcast else None
    materialize = Materializer(model, device=CPU, seed=1, group=group)
    for block in derive_plan(model).blocks:
        fully_shard(model.get_submodule(block), mesh=mesh)
    fully_shard(model, mesh=mesh)
    materialize(model)
    return model


def fsdp1(source: Any) -> nn.Module:
    """Return a model wrapped by FSDP1 over all ranks, each block materialised when it is wrapped."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import CustomPolicy

    model = build_model(source)
    names = {id(module): name for name, module in model.named_modules()}
    materialize = Materializer(model, device=CPU, seed=1)
    for name, module in model.named_modules():
        if list(module.buffers(recurse=False)) and not list(module.parameters()):
            materialize(module, name)
    blocks = {id(model.get_submodule(name)) for name in derive_plan(model).blocks}
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=CustomPolicy(lambda module: id(module) in blocks),
        param_init_fn=lambda module: materialize(module, names[id(module)]),
        device_id=CPU,
        use_orig_params=True,
    )


def logits(model: nn.Module) -> torch.Tensor:
    """Return the logits of a fixed row of 12 tokens."""
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


def same_files(left: Path, right: Path) -> bool:
    """Whether two model directories hold the same tensors, in whatever files."""
    from veomni.models.weights.safetensors_files import SafetensorsFiles

    one, two = SafetensorsFiles(left), SafetensorsFiles(right)
    return sorted(one.names) == sorted(two.names) and all(torch.equal(one.read(n), two.read(n)) for n in one.names)
