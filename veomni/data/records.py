"""One document as its source gives it, and the checked ways to take text or messages out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from veomni.errors import DataError

Message = dict[str, Any]

# Who may speak after whom; None is the start of the conversation.
_MAY_FOLLOW: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


@dataclass(frozen=True)
class Document:
    """A record and where it came from.

    Attributes:
        record: Field names to values.
        where: File and record, for messages: ``"train.jsonl, line 12"``.
    """

    record: Mapping[str, Any]
    where: str


def text_of(document: Document, key: str) -> str:
    """Return the text in field ``key``.

    Raises:
        DataError: the field is missing, null or not text.
    """
    value = _field(document, key, "data.text_key")
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(
            f"{document.where}: field {key!r} is {kind}, not text", "make it a string, or remove the record"
        )
    return value


def messages_of(document: Document, key: str) -> list[Message]:
    """Return the conversation in field ``key``, without the fields that are null.

    Raises:
        DataError: the field is missing or no list of messages, a role is unknown or out of order, or nobody answers.
    """
    value = _field(document, key, "data.messages_key")
    if not isinstance(value, list):
        raise DataError(f"{document.where}: field {key!r} is not a list", "make it a list of {role, content}")
    if not value:
        raise DataError(f"{document.where}: the conversation is empty", "remove the record")
    messages: list[Message] = []
    for number, message in enumerate(value, start=1):
        where = f"{document.where}, message {number}"
        messages.append(_message(message, messages[-1]["role"] if messages else None, where))
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{document.where}: no message is the assistant's, so nothing is learned", "remove the record")
    return messages


def _field(document: Document, key: str, option: str) -> Any:
    if key not in document.record:
        found = ", ".join(sorted(document.record)) or "none"
        raise DataError(f"{document.where}: no field {key!r} (fields: {found})", f"set {option} to the right field")
    return document.record[key]


def _message(message: Any, previous: str | None, where: str) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise DataError(f"{where}: not an object with a role and a content", "write {role: ..., content: ...}")
    role = message["role"]
    if role not in _MAY_FOLLOW:
        raise DataError(f"{where}: unknown role {role!r}", f"use one of: {', '.join(_MAY_FOLLOW)}")
    if previous not in _MAY_FOLLOW[role]:
        place = f"after {previous!r}" if previous else "first"
        raise DataError(
            f"{where}: role {role!r} cannot come {place}", "order: [system], then user and assistant in turn"
        )
    given = {key: value for key, value in message.items() if value is not None}
    if not isinstance(given.get("content", ""), str):
        raise DataError(f"{where}: content is {type(given['content']).__name__}, not text", "make it a string")
    if "content" not in given and "tool_calls" not in given:
        raise DataError(f"{where}: no content", "give it a string as content")
    return given
