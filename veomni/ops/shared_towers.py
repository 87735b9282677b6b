"""Image and video towers of a model whose rows are split: each rank encodes a share of the images.

Every rank of a sequence group is given all images of its rows. Rank ``r`` of ``P`` encodes every ``P``-th of them; the
features are gathered, and those whose placeholder tokens this rank holds go on into its part of the rows. Gradients
go back the same way, so that each tower parameter's gradient is that of all images, once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from veomni.batch import SEQUENCE_SIZE
from veomni.errors import ModelError
from veomni.ops.sequence_exchange import gather_sequence
from veomni.sequence_split import SequencePart

_KINDS = {"get_image_features": "image_token_id", "get_video_features": "video_token_id"}


def share_towers(model: nn.Module, part: SequencePart, group: ProcessGroup) -> None:
    """Let the towers of a model work on split rows; a model without towers is left alone.

    For models like Qwen-VL, whose images are patches ``[patches, channels]`` with sizes ``grid_thw`` ``[images, 3]``.

    Args:
        model: A transformers model.
        part: Which positions of every row this rank holds.
        group: The ranks that share rows.
    """
    owner = next((module for module in model.modules() if _has_towers(module)), None)
    if owner is None:
        return
    row = _Placeholders(part, group)
    model.register_forward_pre_hook(row.remember, with_kwargs=True, prepend=True)
    for name, key in _KINDS.items():
        encode = getattr(owner, name, None)
        if encode is not None:
            token = getattr(model.config, key)
            setattr(owner, name, _Shared(encode, token, row, group))


def _has_towers(module: nn.Module) -> bool:
    # The model with a head only passes on what the body inside it does.
    return hasattr(module, "get_placeholder_mask") and hasattr(module, "get_image_features")


class _Placeholders:
    """Where the tokens of images stand in whole rows."""

    def __init__(self, part: SequencePart, group: ProcessGroup) -> None:
        self.part, self.group = part, group
        self.tokens: Tensor | None = None

    def remember(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.tokens = kwargs.get("input_ids") if SEQUENCE_SIZE in kwargs else None

    def numbers(self, token: int) -> Tensor:
        """Return which features, counted over whole rows, belong to this rank's placeholders, in their order."""
        assert self.tokens is not None
        parts = [torch.empty_like(self.tokens) for _ in range(self.group.size())]
        dist.all_gather(parts, self.tokens.contiguous(), group=self.group)
        length = self.tokens.shape[1] * len(parts)
        whole = self.tokens.new_empty(self.tokens.shape[0], length)
        for place, tokens in enumerate(parts):
            ulysses, cp = divmod(place, self.part.cp)
            indices = SequencePart(self.part.ulysses, ulysses, self.part.cp, cp).indices(length)
            whole[:, indices.to(whole.device)] = tokens
        marked = whole == token
        count = (marked.flatten().cumsum(0) - 1).view_as(whole)
        mine = self.part.indices(length).to(whole.device)
        return count[:, mine][marked[:, mine]]


class _Shared:
    """What is called instead of ``get_image_features`` or ``get_video_features``."""

    def __init__(self, encode: Callable[..., Any], token: int, row: _Placeholders, group: ProcessGroup) -> None:
        if len(inspect.signature(encode).parameters) < 2:
            raise ModelError(
                f"{encode.__name__} takes no sizes of images, so they cannot be shared by the ranks of a row",
                "set train.ulysses_parallel_size and train.context_parallel_size to 1",
            )
        self.encode, self.token, self.row, self.group = encode, token, row, group

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, pixel_values: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """Encode this rank's share and return the features of this rank's placeholders.

        Args:
            pixel_values: Patches of all images, ``[patches, channels]``.
            grid_thw: Their sizes, ``[images, 3]``.
            kwargs: What else the model passes.
        """
        if self.row.tokens is None:
            return self.encode(pixel_values, grid_thw, **kwargs)
        size, rank = self.group.size(), self.group.rank()
        images = pixel_values.split(grid_thw.prod(-1).tolist())
        # A rank without an image encodes one that the others do too, and adds nothing of it.
        mine = list(range(rank, len(images), size)) or [0]
        encoded = self.encode(torch.cat([images[index] for index in mine]), grid_thw[mine], **kwargs)
        numbers = self.row.numbers(self.token)
        counts = self._counts(encoded.pooler_output, len(images), rank)
        encoded.pooler_output = (self._placed(encoded.pooler_output, counts, numbers),)
        if getattr(encoded, "deepstack_features", None):
            encoded.deepstack_features = [
                # 5.17 keeps the images of a layer together, 5.23 splits them
                self._placed((layer,), counts, numbers) if isinstance(layer, Tensor)
                else (self._placed(layer, counts, numbers),)
                for layer in encoded.deepstack_features
            ]  # fmt: skip
        return encoded

    def _counts(self, features: tuple[Tensor, ...], images: int, rank: int) -> list[int]:
        """Return how many features each image has, in order; images of other ranks are asked for."""
        own = torch.zeros(images, dtype=torch.int64, device=features[0].device)
        for index, part in zip(range(rank, images, self.group.size()), features, strict=False):
            own[index] = len(part)
        dist.all_reduce(own, group=self.group)
        return [int(count) for count in own.tolist()]

    def _placed(self, features: tuple[Tensor, ...], counts: list[int], numbers: Tensor) -> Tensor:
        size, rank = self.group.size(), self.group.rank()
        room = max(sum(counts[place::size]) for place in range(size))
        own = torch.cat(tuple(features))
        if rank >= len(counts):
            own = own[:0] + own.sum() * 0
        padded = nn.functional.pad(own, (0, 0, 0, room - len(own)))
        shares = gather_sequence(padded, self.group, dim=0).split(room)
        images: list[Tensor] = [shares[0]] * len(counts)
        for place, share in enumerate(shares):
            theirs = counts[place::size]
            images[place::size] = list(share[: sum(theirs)].split(theirs))
        return torch.cat(images)[numbers]
