"""Whole matrices out of shards and back: every matrix is gathered by one rank, and no rank gathers them all.

The owner receives the shards by all-to-all, works on the whole matrix and sends shards of the result back; replicas
(HSDP) broadcast theirs to one another. Rounds of bounded size overlap: one is in flight while a rank works on another.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from veomni.errors import ModelError
from veomni.ops.comm.all_to_all import AsyncAllToAll, Splits
from veomni.parallel.wrappers import local_shard

_ROUND_ELEMENTS = 2**26  # of whole matrices that a rank holds at a time, about: 128 MiB in bf16

Work = Callable[[Tensor], Tensor]  # what an owner does to whole matrices of one shape, [batch, rows, columns]
Owned = list[list[list["Matrix"]]]  # matrices by owner, [replica][rank]


@dataclass(frozen=True)
class Matrix:
    """A matrix of this rank's, or its shard: a two-dimensional parameter, or one expert of a stack.

    ``parameter`` and ``expert`` (of this rank; None without a stack) are indices, ``shape`` is ``(rows, columns)`` of
    the whole, and ``dim`` the dimension that ranks have shards of.
    """

    parameter: int
    expert: int | None
    shape: tuple[int, int]
    dim: int

    @property
    def cost(self) -> int:
        """What a Newton-Schulz step costs, up to a factor: three products, one of squares of the shorter side."""
        short, long = sorted(self.shape)
        return short * short * (2 * long + short)

    def of(self, tensor: Tensor) -> Tensor:
        """Return this matrix's part of a tensor that is laid out as the parameter's local shard."""
        return tensor if self.expert is None else tensor[self.expert]

    def span(self, ranks: int, rank: int) -> tuple[int, int]:
        """Return where a rank's rows or columns start, and how many they are: the last ranks may have few, or none."""
        size = self.shape[self.dim]
        chunk = math.ceil(size / ranks)
        start = min(size, chunk * rank)
        return start, min(chunk, size - start)

    def shard(self, ranks: int, rank: int) -> tuple[int, int]:
        """Return the shape of what a rank holds."""
        length = self.span(ranks, rank)[1]
        return (length, self.shape[1]) if self.dim == 0 else (self.shape[0], length)


class Holders(NamedTuple):
    """The axes of a mesh whose ranks hold shards, and copies, of the same matrices; none for plain tensors."""

    mesh: DeviceMesh | None = None
    shards: int | None = None
    replicas: int | None = None


def find_matrices(parameters: Sequence[nn.Parameter]) -> dict[Holders, list[Matrix]]:
    """Return this rank's matrices by the ranks it shares them with; a ModelError where the sharding is unsupported."""
    found: dict[Holders, list[Matrix]] = defaultdict(list)
    for index, parameter in enumerate(parameters):
        holders, dim = _holders(parameter)
        shape = (parameter.shape[-2], parameter.shape[-1])
        experts = [None] if parameter.ndim == 2 else range(local_shard(parameter).shape[0])
        found[holders].extend(Matrix(index, expert, shape, dim) for expert in experts)
    return found


def _holders(parameter: nn.Parameter) -> tuple[Holders, int]:
    if not isinstance(parameter, DTensor):
        return Holders(), 0
    mesh, behind = parameter.device_mesh, parameter.ndim - 2
    placed = [(axis, placement) for axis, placement in enumerate(parameter.placements) if mesh.size(axis) > 1]
    copied = [axis for axis, placement in placed if isinstance(placement, Replicate)]
    sharded = [(axis, placement.dim) for axis, placement in placed if type(placement) is Shard]
    inside = [(axis, dim - behind) for axis, dim in sharded if dim >= behind]
    if len(copied) + len(sharded) < len(placed) or len(inside) > 1:
        raise ModelError(
            f"muon cannot gather a matrix {list(parameter.shape)} placed {parameter.placements}: it takes even shards, "
            "not sharded over several axes",
            "use AdamW with this layout",
        )
    axis, dim = inside[0] if inside else (None, 0)
    return Holders(mesh, axis, copied[0] if copied else None), dim


def _place(mesh: DeviceMesh | None, axis: int | None) -> tuple[int, int, ProcessGroup | None]:
    """Return how many ranks an axis of a mesh has, which one this is, and their group; this rank alone without one."""
    if mesh is None or axis is None:
        return 1, 0, None
    return mesh.size(axis), mesh.get_local_rank(axis), mesh.get_group(axis)


class MatrixOwners:
    """Gather matrices at their owners, work on them there, and give every rank its shards of the results.

    All ranks of ``holders`` construct this with the same matrices, and call :meth:`run`. They are sent and worked on in
    ``dtype``, on ``device``.
    """

    def __init__(self, holders: Holders, matrices: Sequence[Matrix], device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.ranks, self.rank, self.group = _place(holders.mesh, holders.shards)
        self.replicas, self.replica, self.replica_group = _place(holders.mesh, holders.replicas)
        self.rounds = list(_share_out(matrices, self.replicas, self.ranks))

    def run(self, read: Callable[[Matrix], Tensor], work: Work) -> Iterator[tuple[Matrix, Tensor]]:
        """Yield this rank's shard of what ``work`` does to every matrix; ``read`` returns its shard, on any device."""
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
    for matrix in sorted(matrices, key=lambda matrix: -matrix.cost):
        if elements and elements + math.prod(matrix.shape) > limit:
            yield owned
            owned, elements = _no_matrices(replicas, ranks), 0
        cost, replica, rank = heap[0]
        heapq.heapreplace(heap, (cost + matrix.cost, replica, rank))
        owned[replica][rank].append(matrix)
        elements += math.prod(matrix.shape)
    if elements:
        yield owned


def _no_matrices(replicas: int, ranks: int) -> Owned:
    return [[[] for _ in range(ranks)] for _ in range(replicas)]


class _Round:
    """The matrices of a round: shards are sent to the owners, and shards of the results back."""

    exchange: AsyncAllToAll

    def __init__(self, owners: MatrixOwners, owned: Owned) -> None:
        self.owners, self.owned = owners, owned
        ranks, rank, self.peers = owners.ranks, owners.rank, owned[owners.replica]
        self.mine = self.peers[rank]
        sent = [_elements(matrices, ranks, rank) for matrices in self.peers]
        self.splits = Splits(sent, [_elements(self.mine, ranks, source) for source in range(ranks)])

    def dispatch(self, read: Callable[[Matrix], Tensor]) -> None:
        """Send this rank's shards to the owners among the ranks of its replica."""
        self._send([read(matrix) for matrices in self.peers for matrix in matrices], self.splits)

    def work(self, work: Work) -> None:
        """Work on the matrices that this rank owns, and send every rank its shards of the results."""
        ranks, wholes = range(self.owners.ranks), self._assemble(self.exchange.wait())
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for index, whole in enumerate(wholes):
            by_shape[whole.shape].append(index)
        for indices in by_shape.values():
            results = work(torch.stack([wholes[index] for index in indices]))
            for index, result in zip(indices, results, strict=True):
                wholes[index] = result
        own = list(zip(self.mine, wholes, strict=True))
        shards = [whole.narrow(m.dim, *m.span(len(ranks), rank)) for rank in ranks for m, whole in own]
        self._send(shards, self.splits.back())

    def _send(self, shards: list[Tensor], splits: Splits) -> None:
        device, dtype = self.owners.device, self.owners.dtype
        rows = [shard.reshape(-1).to(device, dtype) for shard in shards]
        flat = torch.cat(rows) if rows else torch.empty(0, device=device, dtype=dtype)
        self.exchange = AsyncAllToAll.start(flat, splits, self.owners.group)

    def _assemble(self, received: Tensor) -> list[Tensor]:
        blocks = enumerate(received.split(self.splits.received))
        by_source = [_unpack(block, self.mine, self.owners.ranks, source) for source, block in blocks]
        return [torch.cat(parts, m.dim) for m, *parts in zip(self.mine, *by_source, strict=True)]

    def combine(self) -> Iterator[tuple[Matrix, Tensor]]:
        """Yield this rank's shards of the results, those that other replicas worked on included."""
        owners = self.owners
        for matrices, flat in zip(self.owned, self._from_all_replicas(self.exchange.wait()), strict=True):
            here = [matrix for rank in matrices for matrix in rank]
            yield from zip(here, _unpack(flat, here, owners.ranks, owners.rank), strict=True)

    def _from_all_replicas(self, own: Tensor) -> list[Tensor]:
        owners = self.owners
        if owners.replicas == 1:
            return [own]
        sizes = [sum(_elements(rank, owners.ranks, owners.rank) for rank in matrices) for matrices in self.owned]
        results = [own if replica == owners.replica else own.new_empty(size) for replica, size in enumerate(sizes)]
        sent = [
            dist.broadcast(result, group=owners.replica_group, group_src=replica, async_op=True)
            for replica, result in enumerate(results)
        ]
        for work in sent:
            assert work is not None
            work.wait()
        return results


def _unpack(flat: Tensor, matrices: Sequence[Matrix], ranks: int, rank: int) -> list[Tensor]:
    """Return a rank's shards of matrices out of the buffer that they lie in one behind the other."""
    shapes = [matrix.shard(ranks, rank) for matrix in matrices]
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _elements(matrices: Sequence[Matrix], ranks: int, rank: int) -> int:
    """Return how many numbers of these matrices a rank holds."""
    return sum(math.prod(matrix.shard(ranks, rank)) for matrix in matrices)
