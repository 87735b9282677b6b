"""One device mesh for the world, with named views; the design follows torchtitan's ``ParallelDims``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from veomni.batch.split import SequenceShard
from veomni.compat.collectives import flattened, limit_group
from veomni.errors import LayoutError

AXES = ("pp", "dp_replicate", "dp_shard", "ulysses", "cp", "tp")
"""In the order of the mesh, slowest first."""
VIEWS = {
    "data": ("dp_replicate", "dp_shard"),  # ranks that read different rows
    "sequence": ("ulysses", "cp"),  # ranks that share a row
    "fsdp": ("dp_shard", "ulysses", "cp"),  # ranks that parameters are sharded over
    "loss": ("dp_replicate", "dp_shard", "ulysses", "cp"),  # ranks that losses and gradients are reduced over
}


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the mesh axes; at most one of ``dp_replicate`` and ``dp_shard`` may be -1, "the rest of the world".

    Experts have no axis of their own: they divide the ranks of ``fsdp``, or, if more ranks share them, those of
    ``loss``. With ``ep`` neighbours share experts; with ``ep_strided`` ranks that are far apart, so that each expert is
    gathered inside a node and tokens are exchanged between nodes.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = -1
    ulysses: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    ep_strided: int = 1

    def resolve(self, world_size: int) -> ParallelDims:
        """Return the same sizes with -1 filled in; a LayoutError where they do not fit the world or each other."""
        for axis in (*AXES, "ep", "ep_strided"):
            size = self.size(axis)
            if size < 1 and not (size == -1 and axis in ("dp_replicate", "dp_shard")):
                raise LayoutError(f"mesh axis {axis} has size {size}", "give a positive size")
        dims = self._fill(world_size)
        product = math.prod(dims.size(axis) for axis in AXES)
        if product != world_size:
            shown = " x ".join(f"{axis} {dims.size(axis)}" for axis in AXES if dims.size(axis) > 1) or "1"
            problem = f"the mesh axes multiply to {product} ({shown}) but there are {world_size} ranks"
            raise LayoutError(problem, f"start {product} ranks (devices) or change the sizes", field="Launcher.devices")
        experts, fsdp, loss = dims.experts, dims.size("fsdp"), dims.size("loss")
        if fsdp % experts and (experts % fsdp or loss % experts):
            ranks, which = (loss, "there are") if fsdp == 1 else (fsdp, "that share parameters")
            problem = f"expert parallel size {experts} does not divide the {ranks} ranks {which}"
            raise LayoutError(problem, f"use a divisor of {ranks}", field="ExpertParallel.size")
        return dims

    def _fill(self, world_size: int) -> ParallelDims:
        unknown = [axis for axis in ("dp_replicate", "dp_shard") if self.size(axis) == -1]
        if not unknown:
            return self
        if len(unknown) == 2:
            raise LayoutError("dp_replicate and dp_shard are both -1", "give one of them a size")
        known = math.prod(self.size(axis) for axis in AXES if axis != unknown[0])
        return replace(self, **{unknown[0]: max(1, world_size // known)})

    def size(self, name: str) -> int:
        """Return how many ranks an axis or view has."""
        return math.prod(getattr(self, axis) for axis in VIEWS.get(name, (name,)))

    @property
    def experts(self) -> int:
        """Ranks that share the experts of a layer."""
        return self.ep * self.ep_strided

    @property
    def expert_shards(self) -> int:
        """Ranks that each expert is sharded over."""
        return max(1, self.size("fsdp") // self.experts)

    @property
    def expert_replicas(self) -> int:
        """Copies of each expert."""
        return self.size("loss") // (self.experts * self.expert_shards)


class ParallelState:
    """The live mesh of resolved ``dims``: size, rank and group of every axis and view.

    A collective of any axis waits ``timeout`` at most; None leaves PyTorch's default.

    Attributes:
        parameter_mesh: What parameters live on: ``[fsdp]``, or ``[dp_replicate, fsdp]`` where shards are replicated.
        expert_mesh: What each expert is sharded over: ``[ep_fsdp]``, or ``[ep_replicate, ep_fsdp]``; without ``ep`` the
            same as other parameters.
    """

    def __init__(self, dims: ParallelDims, device_type: str, *, timeout: timedelta | None = None) -> None:
        self.dims = dims
        world = _mesh(device_type, **{axis: dims.size(axis) for axis in AXES})
        # Meshes compare by identity, so each view is made once.
        self._meshes: dict[str, DeviceMesh] = {axis: world[axis] for axis in AXES}
        self._meshes |= {view: flattened(world[axes], view) for view, axes in VIEWS.items()}
        self.parameter_mesh = self._meshes["fsdp"]
        if dims.dp_replicate > 1:
            # A flattened axis cannot be sliced together with another one, so the dense view is a mesh of its own.
            names = ("pp", "dp_replicate", "fsdp", "tp")
            self.parameter_mesh = _mesh(device_type, **{name: dims.size(name) for name in names})[names[1:3]]
        self.expert_mesh = self._expert_views(device_type) if dims.experts > 1 else self.parameter_mesh
        if timeout is not None:
            for mesh in (*self._meshes.values(), self.parameter_mesh, self.expert_mesh):
                for group in mesh.get_all_groups():
                    limit_group(group, timeout)

    def _expert_views(self, device_type: str) -> DeviceMesh:
        """Lay the ranks of ``loss`` out as ``ep_replicate x ep_fsdp x ep``, and return the mesh that shards an expert.

        ``ep`` ranks share the experts of a layer; each is sharded over ``ep_fsdp`` and held ``ep_replicate`` times.
        """
        dims = self.dims
        sizes = {"ep_replicate": dims.expert_replicas, "ep_fsdp": dims.expert_shards, "ep": dims.experts}
        order = ["ep_replicate", "ep_fsdp", "ep"]
        if dims.ep_strided > 1:
            order = ["ep", *order[:2]] if dims.experts > dims.size("fsdp") else ["ep_replicate", "ep", "ep_fsdp"]
        mesh = _mesh(device_type, pp=dims.pp, **{axis: sizes[axis] for axis in order}, tp=dims.tp)
        self._meshes |= {"ep": mesh["ep"], "ep_fsdp": mesh["ep_fsdp"]}
        return mesh["ep_replicate", "ep_fsdp"] if dims.expert_replicas > 1 else self._meshes["ep_fsdp"]

    def mesh(self, axis: str) -> DeviceMesh:
        """Return the one-dimensional mesh of an axis or view; a LayoutError where no such name exists."""
        if axis not in self._meshes:
            raise LayoutError(f"the mesh has no axis {axis!r}", f"use one of: {', '.join(self._meshes)}")
        return self._meshes[axis]

    def size(self, axis: str) -> int:
        """Return how many ranks an axis or view has."""
        return int(self.mesh(axis).size())

    def rank(self, axis: str) -> int:
        """Return this process's position on an axis or view."""
        return int(self.mesh(axis).get_local_rank())

    def group(self, axis: str) -> ProcessGroup:
        """Return the process group of an axis or view."""
        return self.mesh(axis).get_group()

    @property
    def sequence_shard(self) -> SequenceShard:
        """Which positions of every row this rank holds."""
        return SequenceShard(self.size("ulysses"), self.rank("ulysses"), self.size("cp"), self.rank("cp"))


def _mesh(device_type: str, **sizes: int) -> DeviceMesh:
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def init_process_group(device: torch.device, backend: str, *, rank: int, world_size: int, timeout: timedelta) -> None:
    """Make the process group of all ranks, over gloo for the CPU and over ``backend`` for ``device``; once."""
    if dist.is_initialized():
        return
    backends = f"cpu:gloo,{device.type}:{backend}" if device.type != "cpu" else "gloo"
    store = dist.HashStore() if world_size == 1 else None  # type: ignore[attr-defined]
    dist.init_process_group(backends, store=store, rank=rank, world_size=world_size, timeout=timeout)


_state: ParallelState | None = None


def set_parallel_state(state: ParallelState | None) -> None:
    """Make ``state`` what :func:`get_parallel_state` returns; the launcher does this once."""
    global _state
    _state = state


def get_parallel_state() -> ParallelState:
    """Return the live mesh; a LayoutError before a launcher has built it."""
    if _state is None:
        raise LayoutError("there is no device mesh yet", "call launcher.launch() first")
    return _state
