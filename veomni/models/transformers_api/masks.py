"""Attention masks: transformers' makers of them and the rules they are made from."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def restrict_to_documents(mask_function: Any, documents: Tensor) -> Any:
    """Return a mask rule that also requires query and key to be in the same document of ``[batch, seq]`` indices."""
    from transformers.masking_utils import and_masks, packed_sequence_mask_function

    return and_masks(mask_function, packed_sequence_mask_function(documents))


def reindex_mask(mask_function: Any, positions: Tensor) -> Any:
    """Return a mask rule that counts the places of query and key as ``positions``, ``[batch, seq]``, says."""

    def counted(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return mask_function(batch, head, positions[batch, query], positions[batch, key])

    return counted


def disable_packing_detection(known: Callable[[], bool]) -> None:
    """Keep transformers from looking for packed documents in position ids while ``known()`` returns True.

    Its own search sees one shard of a row where several ranks share it, and what it finds there is wrong. The search is
    replaced once in a process; what ``known`` reads is of the current call.
    """
    from transformers import masking_utils

    search = masking_utils.find_packed_sequence_indices
    if search in _replaced:
        return

    def search_unless_known(position_ids: Tensor) -> Tensor | None:
        return None if known() else search(position_ids)

    _replaced.add(search_unless_known)
    masking_utils.find_packed_sequence_indices = search_unless_known


_replaced: set[Callable[..., Any]] = set()


def is_plain_causal(mask_function: Any) -> bool:
    """Whether a rule is plain causal: a query attends to the keys up to its own position."""
    from transformers import masking_utils

    return mask_function is getattr(masking_utils, "causal_mask_function", None)
