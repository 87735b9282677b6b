"""A small model with experts, on one process or on ranks whose parameters live on several meshes."""

from __future__ import annotations

import torch
import torch._dynamo  # every rank would import it in its first optimizer step
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

EXPERTS, WIDTH, INNER = 4, 6, 8


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))
        self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        up, down, bias = (p.to_local() if isinstance(p, DTensor) else p for p in self.parameters())
        return x + torch.einsum("th,eih,eoi->to", x, up, down) + bias.sum(0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, 5)  # 5 rows: of four ranks, the last has none
        self.tall = nn.Linear(5, WIDTH, bias=False)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x + self.tall(self.wide(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 10, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def new_model(dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


MATRICES = [
    f"layers.{layer}.{name}"
    for layer in (0, 1)
    for name in ("wide.weight", "tall.weight", "experts.up_proj", "experts.down_proj")
]

LAYOUTS = {
    "single": 1, "ddp": 2, "fsdp2_1": 1, "fsdp2_2": 2, "fsdp2_4": 4, "hsdp": 4, "ep2": 2, "ep4": 4, "ep2_fsdp2": 4,
    "ep2_fsdp2_columns": 4, "hsdp_ep2": 4, "hsdp_fsdp2_ep1": 4,
}  # fmt: skip
"""Names and ranks; in ``ep*`` and ``hsdp_*`` experts have a mesh of their own."""


def laid_out(layout: str, model: nn.Module | None = None) -> nn.Module:
    """The model of :func:`new_model` (or ``model``) on this layout; the process group is there."""
    model = new_model() if model is None else model
    if layout == "single":
        return model
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    mesh = dense_mesh(layout)
    if "ep" in layout:
        for block in model.layers:  # type: ignore[union-attr]
            shard_experts(block.experts, layout)
    for block in model.layers:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def dense_mesh(layout: str) -> DeviceMesh:
    ranks = LAYOUTS[layout]
    if layout.startswith("hsdp"):
        return init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp_replicate", "fsdp"))
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))


def shard_experts(experts: nn.Module, layout: str) -> None:
    """``Shard(0)`` over ``ep``, then ``fully_shard`` over ``ep_fsdp`` on rows or columns, as expert parallelism is."""
    ranks = LAYOUTS[layout]
    replicas = 2 if layout.startswith("hsdp") else 1
    ep = next(size for size in (4, 2, 1) if f"ep{size}" in layout)
    names = ("dp_replicate", "ep_fsdp", "ep")
    mesh = init_device_mesh("cpu", (replicas, ranks // replicas // ep, ep), mesh_dim_names=names)
    for name, parameter in list(experts.named_parameters()):
        whole = distribute_tensor(parameter.detach(), mesh["ep"], [Shard(0)])
        experts.register_parameter(name, nn.Parameter(whole))
    dim = 2 if "columns" in layout else 1
    fully_shard(
        experts,
        mesh=mesh["dp_replicate", "ep_fsdp"] if replicas > 1 else mesh["ep_fsdp"],
        shard_placement_fn=lambda parameter: Shard(min(dim, parameter.ndim - 1)),
    )


def fsdp1_with_experts(model: Model, mesh: DeviceMesh) -> FullyShardedDataParallel:
    """FSDP1 around everything but the experts, which FSDP2 shards."""
    for block in model.layers:
        fully_shard(block.experts, mesh=mesh)
    return FullyShardedDataParallel(
        model,
        device_mesh=mesh,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        ignored_states=[parameter for block in model.layers for parameter in block.experts.parameters()],
    )


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(step: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=dtype) for name, p in new_model(dtype).named_parameters()
    }


def give_gradients(model: nn.Module, step: int, skip: tuple[str, ...] = ()) -> None:
    """Give every parameter the gradient of :func:`gradients`, placed as it is."""
    found = gradients(step, next(model.parameters()).dtype)
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(found[name], parameter.device_mesh, parameter.placements)
        else:
            gradient = found[name]
        parameter.grad = None if name in skip else gradient


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(parameter).clone() for name, parameter in model.named_parameters()}
