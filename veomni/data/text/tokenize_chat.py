"""Conversations to tokens, and what the loss of each weighs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from veomni.data.sources.records import Conversation
from veomni.data.text.rendering import Rendered, render_conversation
from veomni.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[list[int], list[float]]  # ids, and what the loss of each weighs: 0 where none is taken


def tokenize_conversations(
    conversations: Sequence[Conversation], where: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: str
) -> list[Tokens]:
    """Return the token ids of every conversation, and for each what its loss weighs: 0 where it is not supervised.

    Args:
        conversations: Checked messages and tools.
        where: Names each conversation, for messages.
        tokenizer: A fast tokenizer: tokens are matched to what was rendered.
        template: Jinja source of the chat template.

    Raises:
        DataError: the template rejects a conversation, changes what it rendered before when messages are added, or
            leaves no token of a conversation to supervise; or the tokenizer is not a fast one.
    """
    rendered = [render_conversation(*pair, tokenizer, template) for pair in zip(conversations, where, strict=True)]
    return tokenize_rendered(rendered, where, tokenizer)


def tokenize_rendered(
    rendered: Sequence[Rendered], where: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Tokens]:
    """Tokenize conversations that have been rendered; a token weighs what the heaviest of its characters does.

    Raises:
        DataError: a conversation has no supervised token, or the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} cannot match tokens to text", "use a fast tokenizer (tokenizer.json)"
        )
    batch: Any = tokenizer(
        [one.text for one in rendered], add_special_tokens=False, return_attention_mask=False,
        return_offsets_mapping=True, verbose=False,
    )  # fmt: skip
    encoded = []
    for ids, offsets, one, name in zip(batch["input_ids"], batch["offset_mapping"], rendered, where, strict=True):
        weights = _weights(offsets, one)
        if not any(weights):
            fix = "give an answer a weight that is not 0, or use another chat_template"
            raise DataError(f"{name}: the chat template leaves no supervised token", fix, "Encoder.chat_template")
        encoded.append((ids, weights))
    return encoded


def _weights(offsets: Sequence[tuple[int, int]], rendered: Rendered) -> list[float]:
    """Return for every token the largest weight of the spans that have a character of it."""
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    weights = np.zeros(len(starts))
    for begin, stop, weight in rendered.supervised:
        touched = (starts < stop) & (ends > begin)
        weights[touched] = np.maximum(weights[touched], weight)
    return weights.tolist()
