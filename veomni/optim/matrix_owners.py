"""Whole matrices out of shards and back: every matrix is gathered by one rank, and no rank gathers them all.

Ranks that hold shards of the same matrices share them out by cost, the most expensive first, each to the rank that has
least to do. The owner receives the shards by all-to-all, works on the whole matrix and sends shards of the result back.
Replicas (HSDP) share the matrices out as well, and broadcast the results to one another. What is sent depends on shapes
and meshes only, in rounds of bounded size, the next of which is in flight while a rank works on the one before.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from veomni.errors import ModelError
from veomni.ops.comm.all_to_all import AsyncAllToAll, Splits
from veomni.optim.newton_schulz import newton_schulz_flops
from veomni.parallel.tensors import local_shard

_ROUND_ELEMENTS = 2**26
"""Elements of whole matrices that a rank holds at a time, about: 128 MiB in bf16."""

Work = Callable[[Tensor], Tensor]
"""What an owner does to whole matrices of one shape, ``[batch, rows, columns]``."""

Owned = list[list[list["Matrix"]]]
"""Matrices by owner, ``[replica][rank]``."""


@dataclass(frozen=True)
class Matrix:
    """A matrix of this rank's, or its shard: a two-dimensional parameter, or one expert of a stack.

    Attributes:
        parameter: Which of the parameters it belongs to.
        expert: Which of this rank's experts, None for a parameter that is a matrix.
        shape: ``(rows, columns)`` of the whole matrix.
        dim: The dimension that ranks have shards of, 0 or 1; None where this rank holds all of it.
    """

    parameter: int
    expert: int | None
    shape: tuple[int, int]
    dim: int | None

    def of(self, tensor: Tensor) -> Tensor:
        """Return this matrix's part of a tensor that is laid out as the parameter's local shard."""
        return tensor if self.expert is None else tensor[self.expert]

    def shard(self, ranks: int, rank: int) -> tuple[int, int]:
        """Return the shape of what a rank holds."""
        length = self._span(ranks, rank)[1]
        return self.shape if self.dim is None else (length, self.shape[1]) if self.dim == 0 else (self.shape[0], length)

    def cut(self, whole: Tensor, ranks: int, rank: int) -> Tensor:
        """Return a rank's shard of the whole matrix."""
        return whole if self.dim is None else whole.narrow(self.dim, *self._span(ranks, rank))

    def _span(self, ranks: int, rank: int) -> tuple[int, int]:
        """Return where a rank's rows or columns start, and how many they are: the last ranks may have few, or none."""
        size = self.shape[self.dim or 0]
        chunk = math.ceil(size / ranks)
        start = min(size, chunk * rank)
        return start, min(size, start + chunk) - start


@dataclass(frozen=True)
class Holders:
    """The ranks that hold shards, and copies, of the same matrices.

    Attributes:
        mesh: What the parameters live on; None for plain tensors, which every rank works on alone.
        shards: The mesh's axis that matrices are sharded over, or None.
        replicas: The axis with copies, or None.
    """

    mesh: DeviceMesh | None = None
    shards: int | None = None
    replicas: int | None = None

    def size(self, axis: int | None) -> int:
        """Return how many ranks an axis has; 1 without it."""
        return 1 if self.mesh is None or axis is None else self.mesh.size(axis)

    def rank(self, axis: int | None) -> int:
        """Return this rank's place on an axis."""
        return 0 if self.mesh is None or axis is None else self.mesh.get_local_rank(axis)

    def group(self, axis: int | None) -> ProcessGroup:
        """Return the ranks of an axis."""
        assert self.mesh is not None
        assert axis is not None
        return self.mesh.get_group(axis)


def find_matrices(parameters: Sequence[nn.Parameter]) -> dict[Holders, list[Matrix]]:
    """Return the matrices that this rank has a part of, by the ranks it shares them with.

    Raises:
        ModelError: a parameter is sharded in a way that is not known here.
    """
    found: dict[Holders, list[Matrix]] = {}
    for index, parameter in enumerate(parameters):
        holders, dim = _holders(parameter)
        local = local_shard(parameter)
        shape = (parameter.shape[-2], parameter.shape[-1])
        experts = [None] if parameter.ndim == 2 else range(local.shape[0])
        found.setdefault(holders, []).extend(Matrix(index, expert, shape, dim) for expert in experts)
    return found


def _holders(parameter: nn.Parameter) -> tuple[Holders, int | None]:
    if not isinstance(parameter, DTensor):
        return Holders(), None
    mesh, behind = parameter.device_mesh, parameter.ndim - 2
    sharded, copied = [], []
    for axis, placement in enumerate(parameter.placements):
        if mesh.size(axis) == 1:
            continue
        if isinstance(placement, Replicate):
            copied.append(axis)
        elif type(placement) is not Shard:
            raise ModelError(
                f"muon cannot gather a matrix {list(parameter.shape)} placed {parameter.placements}",
                "use AdamW with this layout",
            )
        elif placement.dim >= behind:
            sharded.append((axis, placement.dim - behind))
    if len(sharded) > 1:
        raise ModelError(
            f"muon cannot gather a matrix {list(parameter.shape)} sharded over several axes, {parameter.placements}",
            "use AdamW with this layout",
        )
    replicas = copied[0] if copied else None
    if not sharded:
        return Holders(mesh, None, replicas), None
    ((axis, dim),) = sharded
    return Holders(mesh, axis, replicas), dim


class MatrixOwners:
    """Gather matrices at their owners, work on them there, and hand every rank its shards of the results.

    Args:
        holders: The ranks that take part; all of them construct this with the same matrices, and call :meth:`run`.
        matrices: What this rank has a part of.
        device: Where matrices are sent and worked on.
        dtype: The dtype they are sent in.
    """

    def __init__(self, holders: Holders, matrices: Sequence[Matrix], device: torch.device, dtype: torch.dtype) -> None:
        self.holders, self.device, self.dtype = holders, device, dtype
        self.ranks, self.rank = holders.size(holders.shards), holders.rank(holders.shards)
        self.replicas, self.replica = holders.size(holders.replicas), holders.rank(holders.replicas)
        self.exchange_group = holders.group(holders.shards) if self.ranks > 1 else None
        self.rounds = list(_share_out(matrices, self.replicas, self.ranks))

    def empty(self, elements: int) -> Tensor:
        """Return an empty buffer to send or receive."""
        return torch.empty(elements, device=self.device, dtype=self.dtype)

    def run(self, read: Callable[[Matrix], Tensor], work: Work) -> Iterator[tuple[Matrix, Tensor]]:
        """Yield this rank's shard of every result.

        Args:
            read: Returns this rank's shard of a matrix, on any device.
            work: What is done to whole matrices.
        """
        rounds = [_Round(self, owned) for owned in self.rounds]
        for first in rounds[:1]:
            first.dispatch(read)
        for index, current in enumerate(rounds):
            if index + 1 < len(rounds):
                rounds[index + 1].dispatch(read)
            current.work(work)
            if index:
                yield from rounds[index - 1].combine()
        for last in rounds[-1:]:
            yield from last.combine()


def _share_out(matrices: Sequence[Matrix], replicas: int, ranks: int) -> Iterator[Owned]:
    """Yield rounds of matrices by owner; the same on all ranks."""
    heap = [(0, replica, rank) for replica in range(replicas) for rank in range(ranks)]
    limit = _ROUND_ELEMENTS * len(heap)
    owned, elements = _no_matrices(replicas, ranks), 0
    for matrix in sorted(matrices, key=lambda matrix: -newton_schulz_flops(*matrix.shape)):
        if elements and elements + math.prod(matrix.shape) > limit:
            yield owned
            owned, elements = _no_matrices(replicas, ranks), 0
        cost, replica, rank = heap[0]
        heapq.heapreplace(heap, (cost + newton_schulz_flops(*matrix.shape), replica, rank))
        owned[replica][rank].append(matrix)
        elements += math.prod(matrix.shape)
    if elements:
        yield owned


def _no_matrices(replicas: int, ranks: int) -> Owned:
    return [[[] for _ in range(ranks)] for _ in range(replicas)]


class _Round:
    """The matrices of a round: shards are sent to the owners, and shards of the results back."""

    def __init__(self, owners: MatrixOwners, owned: Owned) -> None:
        self.owners, self.owned = owners, owned
        ranks, rank, here = owners.ranks, owners.rank, owned[owners.replica]
        self.mine = here[rank]
        sent = [_elements(matrices, ranks, rank) for matrices in here]
        self.splits = Splits(sent, [_elements(self.mine, ranks, source) for source in range(ranks)])
        self.exchange: AsyncAllToAll | None = None

    def dispatch(self, read: Callable[[Matrix], Tensor]) -> None:
        """Send this rank's shards to the owners among the ranks of its replica."""
        owners = self.owners
        shards = [read(matrix).reshape(-1) for matrices in self.owned[owners.replica] for matrix in matrices]
        rows = torch.cat(shards).to(owners.device, owners.dtype) if shards else owners.empty(0)
        self.exchange = AsyncAllToAll.start(rows, self.splits, owners.exchange_group)

    def work(self, work: Work) -> None:
        """Work on the matrices that this rank owns, and send every rank its shards of the results."""
        owners = self.owners
        wholes = self._assemble(self._wait())
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for index, whole in enumerate(wholes):
            by_shape[whole.shape].append(index)
        for indices in by_shape.values():
            results = work(torch.stack([wholes[index] for index in indices]))
            for index, result in zip(indices, results, strict=True):
                wholes[index] = result
        shards = [
            matrix.cut(whole, owners.ranks, rank).reshape(-1)
            for rank in range(owners.ranks)
            for matrix, whole in zip(self.mine, wholes, strict=True)
        ]
        rows = torch.cat(shards) if shards else owners.empty(0)
        self.exchange = AsyncAllToAll.start(rows, self.splits.back(), owners.exchange_group)

    def _assemble(self, received: Tensor) -> list[Tensor]:
        ranks = self.owners.ranks
        parts: list[list[Tensor]] = [[] for _ in self.mine]
        for source, block in enumerate(received.split(self.splits.received)):
            for part, shard in zip(parts, _unpack(block, self.mine, ranks, source), strict=True):
                part.append(shard)
        return [torch.cat(part, dim=matrix.dim or 0) for part, matrix in zip(parts, self.mine, strict=True)]

    def combine(self) -> Iterator[tuple[Matrix, Tensor]]:
        """Yield this rank's shards of the results, those that other replicas worked on included."""
        owners = self.owners
        for matrices, flat in zip(self.owned, self._from_all_replicas(self._wait()), strict=True):
            here = [matrix for rank in matrices for matrix in rank]
            yield from zip(here, _unpack(flat, here, owners.ranks, owners.rank), strict=True)

    def _from_all_replicas(self, own: Tensor) -> list[Tensor]:
        owners = self.owners
        if owners.replicas == 1:
            return [own]
        group = owners.holders.group(owners.holders.replicas)
        results, sent = [], []
        for replica, matrices in enumerate(self.owned):
            size = sum(_elements(rank, owners.ranks, owners.rank) for rank in matrices)
            results.append(own if replica == owners.replica else owners.empty(size))
            sent.append(dist.broadcast(results[-1], group=group, group_src=replica, async_op=True))
        for work in sent:
            assert work is not None
            work.wait()
        return results

    def _wait(self) -> Tensor:
        exchange, self.exchange = self.exchange, None
        assert exchange is not None
        return exchange.wait()


def _unpack(flat: Tensor, matrices: Sequence[Matrix], ranks: int, rank: int) -> Iterator[Tensor]:
    """Yield a rank's shards of matrices out of the buffer that they lie in one behind the other."""
    shapes = [matrix.shard(ranks, rank) for matrix in matrices]
    for part, shape in zip(flat.split([math.prod(shape) for shape in shapes]), shapes, strict=True):
        yield part.view(shape)


def _elements(matrices: Sequence[Matrix], ranks: int, rank: int) -> int:
    """Return how many numbers of these matrices a rank holds."""
    return sum(math.prod(matrix.shard(ranks, rank)) for matrix in matrices)
