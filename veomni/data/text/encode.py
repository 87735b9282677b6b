"""Texts, conversations, token ids and preference pairs as token ids, and the weight of each in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from veomni.batch.fields import IGNORE_INDEX
from veomni.data.data_type import Encoded, EncodeOptions
from veomni.data.sources.formats import MESSAGES
from veomni.data.sources.records import Document, conversation_of, field_of, is_weight, text_of
from veomni.data.text.preference import Pair, pair_of
from veomni.data.text.tokenize_chat import tokenize_conversations
from veomni.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TOKEN_KEYS = ("input_ids", "labels", "loss_weights")
"""Fields of a pretokenized record."""


def plaintext(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> list[Encoded]:
    """Tokenize texts with the tokenizer's own special tokens, each ended by its end-of-sequence token.

    Raises:
        DataError: a field is missing or no text, or the tokenizer has no end-of-sequence token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no eos_token, so documents have no end", "set tokenizer.eos_token")
    texts = [text_of(document, options.text_key) for document in documents]
    batch = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return [Encoded(ids if ids and ids[-1] == end else [*ids, end]) for ids in batch["input_ids"]]


def conversation(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> list[Encoded]:
    """Render conversations with the chat template; supervise the assistant's messages, by their weights.

    Raises:
        DataError: a conversation is malformed, or the template cannot render it.
    """
    conversations = [conversation_of(document, MESSAGES) for document in documents]
    where = [document.where for document in documents]
    encoded = tokenize_conversations(conversations, where, tokenizer, options.chat_template)
    return [Encoded(ids, weights) for ids, weights in encoded]


def pretokenized(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> list[Encoded]:
    """Return given ``input_ids``, supervised where ``labels`` are not ``IGNORE_INDEX``, weighted by ``loss_weights``.

    Raises:
        DataError: a field is no list of the tokenizer's ids, labels are neither the ids nor ``IGNORE_INDEX``, or a
            weight is negative or no finite number.
    """
    return [_given_tokens(document, len(tokenizer)) for document in documents]


def preference(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> list[Encoded]:
    """Render pairs of conversations that end in a better and a worse answer; supervise those answers.

    Raises:
        DataError: a pair is malformed, or the template cannot render it.
    """
    pairs: list[Pair] = [pair_of(document) for document in documents]
    sides = [
        tokenize_conversations(
            [pair[side] for pair in pairs], [f"{document.where}, {name}" for document in documents], tokenizer,
            options.chat_template,
        )
        for side, name in enumerate(("chosen", "rejected"))
    ]  # fmt: skip
    return [
        Encoded([*chosen[0], *rejected[0]], [*_last_run(chosen[1]), *_last_run(rejected[1])], len(chosen[0]))
        for chosen, rejected in zip(*sides, strict=True)
    ]


def _last_run(weights: Sequence[float]) -> list[float]:
    """Return weights with all but the last run of nonzero ones set to 0: the answer that the pair is about."""
    stop = len(weights) - next(index for index, one in enumerate(reversed(weights)) if one)
    start = next((index + 1 for index in range(stop - 1, -1, -1) if not weights[index]), 0)
    return [0.0] * start + [*weights[start:stop]] + [0.0] * (len(weights) - stop)


def _given_tokens(document: Document, vocabulary: int) -> Encoded:
    ids = _integers(document, "input_ids", field_of(document, "input_ids", "RecordSchema.data_type"))
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        problem = f"{document.where}: token {wrong} in field 'input_ids', and the tokenizer has {vocabulary}"
        raise DataError(problem, "use the tokenizer that made the ids", field="build_tokenizer.path")
    weights = _given_weights(document, len(ids))
    if document.record.get("labels") is None:
        return Encoded(ids, weights)
    labels = _integers(document, "labels", document.record["labels"])
    if len(labels) != len(ids):
        raise DataError(f"{document.where}: {len(labels)} labels for {len(ids)} input_ids", "give each token one")
    for at, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, IGNORE_INDEX):
            problem = f"{document.where}: label {at} is {label}, neither its token {token} nor {IGNORE_INDEX}"
            raise DataError(problem, "labels are not shifted: the model does that")
    given = weights or [1.0] * len(ids)
    return Encoded(ids, [0.0 if label == IGNORE_INDEX else weight for label, weight in zip(labels, given, strict=True)])


def _given_weights(document: Document, count: int) -> list[float] | None:
    value = document.record.get("loss_weights")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count:
        problem = f"{document.where}: field {'loss_weights'!r} is no list of {count} numbers"
        raise DataError(problem, "give each of the input_ids one")
    for at, weight in enumerate(value):
        if not is_weight(weight):
            problem = f"{document.where}: weight {at} in field {'loss_weights'!r} is {weight!r}"
            raise DataError(problem, "use 0 (the token is not supervised) or a positive number")
    return value


def _integers(document: Document, key: str, value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise DataError(f"{document.where}: field {key!r} is no list of integers", "write [1, 2, ...]")
    return value
