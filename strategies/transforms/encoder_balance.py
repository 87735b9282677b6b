"""Balance media encoding across ranks: whole images are sent to the ranks with least to encode, and features back.

Documents are dealt to ranks by their tokens: one rank may have ten large images where another has none, and all wait
for it. All ranks compute the same plan; features and gradients come back to their owner, so that no result differs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import override

from veomni.models.adapter.adapter import ModelAdapter
from veomni.ops.comm.all_to_all import Splits, all_to_all
from veomni.ops.encoders.towers import Encode, Items
from veomni.strategies.base import SetupContext, Stage, Strategy

_FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class EncoderBalance(Strategy):
    """Balance the encoding of images, videos and audio across ranks; a model without encoders is left alone."""

    name = "encoder_balance"
    stage = Stage.ENCODERS

    @override
    def transform(self, adapter: ModelAdapter, context: SetupContext) -> None:
        group = context.state.group("loss")
        if group.size() > 1:
            for call in adapter.towers.values():
                call.balance = _Balance(group)


def assign(costs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return which rank encodes each item, from the costs of every rank's items.

    The most expensive item goes first, each to the rank with the least work, its own where that is one of them: at most
    4/3 of the best possible (Graham, 1969, Bounds on multiprocessing timing anomalies).
    """
    loads = [0] * len(costs)
    places = [[0] * len(own) for own in costs]
    items = [(cost, rank, number) for rank, own in enumerate(costs) for number, cost in enumerate(own)]
    for cost, rank, number in sorted(items, key=lambda item: (-item[0], item[1], item[2])):
        least = min(loads)
        place = rank if loads[rank] == least else loads.index(least)
        places[rank][number] = place
        loads[place] += cost
    return places


@dataclass(frozen=True)
class _Plan:
    """Sizes, int64 ``[items, columns]``, rows of values and encoding rank of every rank's items."""

    sizes: list[Tensor]
    lengths: list[list[int]]
    places: list[list[int]]

    def sent(self, source: int, target: int) -> list[int]:
        """Return which of one rank's items another one encodes, in order."""
        return [number for number, place in enumerate(self.places[source]) if place == target]

    def order(self, source: int) -> list[int]:
        """Return one rank's items in the order of the ranks that encode them."""
        return [number for target in range(len(self.places)) for number in self.sent(source, target)]

    def splits(self, rank: int, rows: Sequence[Sequence[int]]) -> Splits:
        """Return what a rank sends and receives on the way to the encoders, where each item has so many rows."""
        ranks = range(len(self.places))
        sent = [sum(rows[rank][number] for number in self.sent(rank, target)) for target in ranks]
        return Splits(sent, [sum(rows[source][number] for number in self.sent(source, rank)) for source in ranks])


class _Balance:
    """Encodes with the other ranks of a group; called by all of them for every modality of every micro-batch."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.rank, self.ranks = group, group.rank(), range(group.size())

    def __call__(self, items: Items, encode: Encode) -> list[list[Tensor]]:
        items = self._alike(items)
        plan = self._plan(items)
        mine = self._receive(items, plan)
        streams = encode(mine)
        widths = [stream[0].shape[-1] for stream in streams]
        features = torch.cat([torch.cat(stream) for stream in streams], dim=-1)
        counts = self._counts([len(piece) for piece in streams[0]] if len(mine) else [], plan, features.device)
        back = [piece.split(widths, dim=-1) for piece in self._return(features, plan, counts)]
        return [[piece[index] for piece in back] for index in range(len(widths))]

    def _alike(self, items: Items) -> Items:
        """Bring values into the format that some rank has, and mel features to the longest of all ranks."""
        audio = items.kind.modality == "audio"
        own = [_FORMATS.index(items.values.dtype), items.values.shape[-1] if audio else 0] if len(items) else [0, 0]
        shared = torch.tensor(own, device=items.values.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.group)
        values, sizes = items.values.to(_FORMATS[int(shared[0])]), items.sizes
        if audio:
            assert sizes is not None
            longest = int(shared[1])  # a rank without any has those of a dummy
            missing = max(0, longest - values.shape[-1])
            values, sizes = (F.pad(part[..., :longest], (0, missing)) for part in (values, sizes))
        return Items(items.kind, values, sizes)

    def _plan(self, items: Items) -> _Plan:
        sizes = torch.zeros(len(items), 0) if items.sizes is None else items.sizes.cpu()
        tables = [(sizes.long(), items.lengths, items.costs) for _ in self.ranks]
        dist.all_gather_object(tables, tables[self.rank], group=self.group)
        every_size, lengths, costs = (list(column) for column in zip(*tables, strict=True))
        return _Plan(every_size, lengths, assign(costs))

    def _receive(self, items: Items, plan: _Plan) -> Items:
        """Return the items that this rank encodes: of the first rank, then of the second, each in its order."""
        chosen = items[plan.order(self.rank)].values
        values = all_to_all(chosen.flatten(1), plan.splits(self.rank, plan.lengths), self.group)
        parts = [plan.sizes[source][plan.sent(source, self.rank)] for source in self.ranks]
        sizes = None if items.sizes is None else torch.cat(parts).to(values.device)
        return Items(items.kind, values.reshape(len(values), *chosen.shape[1:]), sizes)

    def _counts(self, mine: list[int], plan: _Plan, device: torch.device) -> list[list[int]]:
        """Return how many features each item of every rank has."""
        starts = [0]
        for own in plan.places:
            starts.append(starts[-1] + len(own))
        places = [starts[source] + number for source in self.ranks for number in plan.sent(source, self.rank)]
        table = torch.zeros(starts[-1], dtype=torch.int64, device=device)
        table[places] = torch.tensor(mine, dtype=torch.int64, device=device)
        dist.all_reduce(table, group=self.group)
        return [part.tolist() for part in table.split([len(own) for own in plan.places])]

    def _return(self, features: Tensor, plan: _Plan, counts: list[list[int]]) -> list[Tensor]:
        """Return the features of this rank's items in their order; at least one piece, which may be empty."""
        received = all_to_all(features, plan.splits(self.rank, counts).back(), self.group)
        order = plan.order(self.rank)
        if not order:
            return [received]
        placed = dict(zip(order, received.split([counts[self.rank][number] for number in order]), strict=True))
        return [placed[number] for number in sorted(placed)]
