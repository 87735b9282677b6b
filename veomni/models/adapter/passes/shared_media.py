"""Encoders of a model whose rows are split: each rank encodes a share of the images, clips and videos.

Rank ``r`` of ``P`` encodes every ``P``-th item of the rows; the features are gathered, and those whose placeholders the
rank holds go into its shard. Gradients go back the same way, so that a parameter's is that of all items, once.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from veomni.batch.forward_call import ForwardCall, SequenceGroups
from veomni.batch.split import SequenceShard
from veomni.errors import DataError
from veomni.models.adapter.adapter import InputPass, ModelAdapter, Stage
from veomni.ops.comm.sequence_exchange import gather_sequence
from veomni.ops.encoders.towers import Encode, Items, TowerKind


def share_towers(adapter: ModelAdapter, groups: SequenceGroups) -> None:
    """Make the encoders that ``prepare_towers`` found work on rows that ranks share; without any, nothing changes."""
    if not adapter.towers:
        return
    model: Any = adapter.model
    placeholders = LocatePlaceholders(groups)
    adapter.add(placeholders)
    for call in adapter.towers.values():
        call.exchange = _Shared(call.kind, getattr(model.config, call.kind.token), placeholders, groups.ranks)


class LocatePlaceholders(InputPass):
    """Keeps where the tokens of items are in whole rows, and gives models whole rows of ``token_type_ids``."""

    stage = Stage.SEQUENCE

    def __init__(self, groups: SequenceGroups) -> None:
        self.shard, self.group = groups.shard, groups.ranks
        self.split = False
        self.tokens: Tensor | None = None
        self.types: Tensor | None = None

    def before(self, call: ForwardCall) -> None:
        """Keep what distinguishes placeholders; models build masks from whole rows of ``token_type_ids``."""
        self.split = call.micro is not None and call.micro.rows.shard.size > 1
        self.tokens, self.types = call.kwargs.get("input_ids"), call.kwargs.get("mm_token_type_ids")
        types = call.kwargs.get("token_type_ids")
        if self.split and types is not None:
            call.kwargs["token_type_ids"] = self._whole(types)

    def close(self, call: ForwardCall) -> None:
        """Let go of the tensors."""
        self.tokens = self.types = None

    def numbers(self, kind: TowerKind, token: int) -> Tensor:
        """Return which features, counted over whole rows, belong to this rank's placeholders, in their order."""
        whole = self._whole(self._marks(kind, token))
        count = (whole.flatten().cumsum(0) - 1).view_as(whole)
        mine = self.shard.indices(whole.shape[1]).to(whole.device)
        return count[:, mine][whole[:, mine] == 1]

    def _whole(self, own: Tensor) -> Tensor:
        """Return whole rows ``[batch, seq]`` of what this rank has a part of."""
        parts = [torch.empty_like(own) for _ in range(self.group.size())]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        length = own.shape[1] * len(parts)
        whole = own.new_empty(own.shape[0], length)
        for place, part in enumerate(parts):
            ulysses, cp = divmod(place, self.shard.cp)
            indices = SequenceShard(self.shard.ulysses, ulysses, self.shard.cp, cp).indices(length)
            whole[:, indices.to(whole.device)] = part
        return whole

    def _marks(self, kind: TowerKind, token: int) -> Tensor:
        """Return 1 where this rank's tokens are placeholders of one modality, int64 ``[batch, seq / P]``."""
        assert self.tokens is not None
        marked = self.tokens == token
        if kind.token_type is not None:
            if self.types is None:
                problem = "images and videos share a placeholder token, and the batch does not say which is which"
                raise DataError(problem, "give mm_token_type_ids (the processor returns them)")
            marked = marked & (self.types == kind.token_type)
        return marked.long()


class _Shared:
    """The exchange within a group of ranks that were all given the same items."""

    def __init__(self, kind: TowerKind, token: int, row: LocatePlaceholders, group: ProcessGroup) -> None:
        self.kind, self.token, self.row, self.group = kind, token, row, group

    def __call__(self, items: Items, encode: Encode) -> list[Tensor]:
        if not self.row.split or not len(items):  # the others have no item either
            return [torch.cat(stream) for stream in encode(items)]
        size, rank = self.group.size(), self.group.rank()
        streams = encode(items[list(range(rank, len(items), size))])
        numbers = self.row.numbers(self.kind, self.token)
        counts = self._counts(streams[0], len(items), rank)
        return [self._placed(stream, counts, numbers) for stream in streams]

    def _counts(self, features: list[Tensor], items: int, rank: int) -> list[int]:
        """Return how many features each item has, in order, summed over ranks."""
        own = torch.zeros(items, dtype=torch.int64, device=features[0].device)
        for index, piece in zip(range(rank, items, self.group.size()), features, strict=False):
            own[index] = len(piece)
        dist.all_reduce(own, group=self.group)
        return [int(count) for count in own.tolist()]

    def _placed(self, features: list[Tensor], counts: list[int], numbers: Tensor) -> Tensor:
        size = self.group.size()
        room = max(sum(counts[place::size]) for place in range(size))
        own = torch.cat(features)
        padded = nn.functional.pad(own, (0, 0, 0, room - len(own)))
        shares = gather_sequence(padded, self.group, dim=0).split(room)
        pieces: list[Tensor] = [shares[0]] * len(counts)
        for place, share in enumerate(shares):
            theirs = counts[place::size]
            pieces[place::size] = list(share[: sum(theirs)].split(theirs))
        return torch.cat(pieces)[numbers]
