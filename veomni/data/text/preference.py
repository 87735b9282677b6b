"""Preference pairs: one prompt, a better and a worse answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from veomni.data.sources.records import TOOLS_KEY, Conversation, Document, conversation_of, field_of
from veomni.errors import DataError

PREFERENCE_KEYS = ("prompt", "chosen", "rejected")
"""Fields of a record."""

Pair = tuple[Conversation, Conversation]


def pair_of(document: Document) -> Pair:
    """Return the two conversations of a record ``{prompt, chosen, rejected}``; a DataError where it is malformed.

    ``prompt`` is text or messages; ``chosen`` and ``rejected`` are text, a message, or messages. Without a prompt they
    are whole conversations, equal up to their last message.
    """
    prompt = _messages(document, "prompt", "user") if document.record.get("prompt") is not None else []
    sides = []
    for key in ("chosen", "rejected"):
        field_of(document, key, "RecordSchema.data_type")
        messages = [*prompt, *_messages(document, key, "assistant")]
        record = {"messages": messages, TOOLS_KEY: document.record.get(TOOLS_KEY)}
        sides.append(conversation_of(Document(record, f"{document.where}, {key}"), "messages"))
    chosen, rejected = sides
    if chosen.messages[:-1] != rejected.messages[:-1]:
        problem = f"{document.where}: chosen and rejected answer different prompts"
        raise DataError(problem, "make them equal up to their last message, or give the prompt apart")
    for side, name in ((chosen, "chosen"), (rejected, "rejected")):
        if side.messages[-1]["role"] != "assistant":
            raise DataError(f"{document.where}, {name}: the last message is not the assistant's", "end in the answer")
        if side.messages[-1].get("weight") == 0:
            problem = f"{document.where}, {name}: the answer has weight 0, so nothing is supervised"
            raise DataError(problem, "give it another weight, or remove the record")
    return chosen, rejected


def supervised_answer(weights: Sequence[float]) -> list[float]:
    """Return weights with all but the last run of nonzero ones set to 0: the answer that the pair is about."""
    stop = len(weights) - next(index for index, one in enumerate(reversed(weights)) if one)
    start = next((index + 1 for index in range(stop - 1, -1, -1) if not weights[index]), 0)
    return [0.0] * start + [*weights[start:stop]] + [0.0] * (len(weights) - stop)


def _messages(document: Document, key: str, role: str) -> list[Any]:
    value = document.record[key]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        return [value]
    if not isinstance(value, list):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{document.where}: field {key!r} is {kind}", "make it text, a message or a list of messages")
    return value
