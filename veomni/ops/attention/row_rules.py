"""Which positions of a row see which, for attention over whole rows of which each rank holds a part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veomni.batch.forward_call import current_call
from veomni.errors import ModelError
from veomni.models.transformers_api.masks import is_plain_causal

MASK_RULE = "mask_rule"


@dataclass(frozen=True)
class MaskRule:
    """Any rule, as a function.

    ``mask_function`` is transformers': from indices of batch, head, query and key that broadcast, positions of the
    whole row among them, to where a query sees a key. ``causal`` is that no query sees a key after itself.
    """

    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    batch: int
    causal: bool

    def visible(self, q_positions: Tensor, kv_positions: Tensor) -> Tensor:
        """Return where positions ``[q]`` see positions ``[kv]``, bool ``[batch, 1, q, kv]``."""
        rows = torch.arange(self.batch, device=q_positions.device)[:, None, None, None]
        head = rows.new_zeros(1, 1, 1, 1)
        seen = self.mask_function(rows, head, q_positions[None, None, :, None], kv_positions[None, None, None, :])
        return seen.expand(self.batch, 1, len(q_positions), len(kv_positions))

    def reaches(self, q_chunk: int, kv_chunk: int, width: int) -> bool:
        """Whether a chunk of ``width`` queries may see one of keys; chunks are numbered along the row."""
        return not self.causal or kv_chunk <= q_chunk


@dataclass(frozen=True)
class CausalRule:
    """A query sees the keys up to itself, as data: an operation of a compiled graph takes it.

    Attributes:
        batch, length: Rows, and the positions of each.
        boundaries: Offsets of documents, which do not see each other, into the flattened rows, int32 ``[documents +
            1]``; None where each row is one document.
        longest: At least the tokens of the longest document.
        window: How many positions back a query sees, itself included; 0 is all of them.
    """

    batch: int
    length: int
    boundaries: Tensor | None = None
    longest: int = 0
    window: int = 0

    def visible(self, q_positions: Tensor, kv_positions: Tensor) -> Tensor:
        """Return where positions see positions; see :meth:`MaskRule.visible`."""
        back = q_positions[:, None] - kv_positions
        seen = (back >= 0) if not self.window else (back >= 0) & (back < self.window)
        if self.boundaries is None:
            return seen.expand(self.batch, 1, -1, -1)
        numbers = document_numbers(self.boundaries, self.batch, self.length)
        return (seen & (numbers[:, q_positions, None] == numbers[:, None, kv_positions]))[:, None]

    def reaches(self, q_chunk: int, kv_chunk: int, width: int) -> bool:
        """Whether a chunk of queries may see one of keys; see :meth:`MaskRule.reaches`."""
        near = not self.window or (q_chunk - kv_chunk - 1) * width + 1 < self.window
        return kv_chunk <= q_chunk and near

    def segments(self, chunks: Sequence[int], width: int) -> Tensor:
        """Return :attr:`boundaries` in rows that hold some chunks of ``width`` alone, one after the other."""
        assert self.boundaries is not None
        row, place = self.boundaries // self.length, self.boundaries % self.length
        before = [(place - chunk * width).clamp(0, width) for chunk in chunks]
        return sum(before, row * (len(chunks) * width))


Rule = MaskRule | CausalRule


def document_numbers(boundaries: Tensor, batch: int, length: int) -> Tensor:
    """Return the number of each token's document, int64 ``[batch, length]``, from offsets into the flattened rows."""
    tokens = torch.arange(batch * length, device=boundaries.device, dtype=boundaries.dtype)
    return torch.searchsorted(boundaries[1:], tokens, right=True).view(batch, length)


def register_mask_rule() -> None:
    """Make the maker of rules as functions known to transformers, unless it is, perhaps with something around it."""
    from transformers import AttentionMaskInterface

    if MASK_RULE not in AttentionMaskInterface():
        AttentionMaskInterface.register(MASK_RULE, _make_mask_rule)


def _make_mask_rule(
    *, batch_size: int, mask_function: Callable[..., Tensor], causal: bool = False, **options: Any
) -> MaskRule:
    return MaskRule(mask_function, batch_size, causal)


def make_row_rule(*, mask_function: Callable[..., Tensor], allow_is_causal_skip: bool = False, **options: Any) -> Rule:
    """Return the rule of whole rows: a mask maker of transformers. What is not defined on them is a ModelError."""
    from transformers import AttentionMaskInterface

    if options["q_length"] != options["kv_length"] or options.get("q_offset") or options.get("kv_offset"):
        raise unsupported("ring attention was called for other keys than those of the current row")
    if options.get("use_vmap"):
        raise unsupported("the model adds a rule to its mask that is defined on this rank's shard only")
    # SDPA may put is_causal in place of the mask when this is set, so transformers sets it for causal rules only;
    # a window or chunk reaches SDPA in another way.
    causal = allow_is_causal_skip or is_plain_causal(mask_function)
    maker: Callable[..., MaskRule] = AttentionMaskInterface()[MASK_RULE]
    found = _causal_rule(**options) if causal else None
    return found or maker(mask_function=mask_function, causal=causal, **options)


def _causal_rule(
    *, batch_size: int, q_length: int, config: Any = None, local_size: int | None = None, **options: Any
) -> CausalRule | None:
    """Return a causal rule as data, from what its maker is given; None for chunks, which are counted by document."""
    if local_size is not None and getattr(config, "attention_chunk_size", None) is not None:
        return None
    call = current_call()
    documents = None if call is None else call.documents
    window = local_size if local_size is not None and local_size < q_length else 0
    if documents is None or documents.numbers_for(config, batch_size, q_length) is None:
        return CausalRule(batch_size, q_length, window=window)
    if documents.boundaries is None:
        return None
    return CausalRule(batch_size, q_length, documents.boundaries, documents.longest, window)


def unsupported(problem: str) -> ModelError:
    """Return the error for what a ring does not compute."""
    return ModelError(problem, "use Ulysses instead of ContextParallel", "ContextParallel.size Ulysses.size")
