"""One document as its source gives it, and the checked ways to take text or messages out of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from veomni.errors import DataError

Message = dict[str, Any]

# Roles, and those they may follow; None is the start of the conversation.
_MAY_FOLLOW: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "developer": (None, "system"),
    "user": (None, "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


TOOLS_KEY = "tools"
"""Field of a record that holds the functions of a conversation."""

MEDIA_KEYS = {"image": "images", "video": "videos", "audio": "audios"}
"""Kinds of media, and the fields of a record that list those marked by ``<image>`` and so on in its messages."""

_HEAVIEST = 3.4028234663852886e38  # of float32

_THINKING = ("reasoning_content", "thinking", "reasoning")  # its names in templates and data sets


@dataclass(frozen=True)
class Conversation:
    """Checked messages, and the functions they may call.

    Attributes:
        messages: In order; fields that are null are left out.
        tools: JSON schemas of functions, as chat templates take them.
    """

    messages: list[Message]
    tools: list[Any] = field(default_factory=list)


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
    value = field_of(document, key, "RecordSchema.text_key")
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(
            f"{document.where}: field {key!r} is {kind}, not text", "make it a string, or remove the record"
        )
    return value


def conversation_of(document: Document, key: str) -> Conversation:
    """Return the conversation in field ``key`` with the functions in field ``tools``, if there is one.

    Raises:
        DataError: the field is missing or no list of messages, a role is unknown or out of order, or no message is the
            assistant's;
            or a message or a tool is malformed.
    """
    return Conversation(messages_of(document, key), _tools(document))


def messages_of(document: Document, key: str) -> list[Message]:
    """Return the messages in field ``key``, without the fields that are null.

    Raises:
        DataError: the field is missing or no list of messages, a role is unknown or out of order, or no message is the
            assistant's.
    """
    value = field_of(document, key, "RecordSchema.messages_key")
    if not isinstance(value, list):
        raise DataError(f"{document.where}: field {key!r} is not a list", "make it a list of {role, content}")
    if not value:
        raise DataError(f"{document.where}: the conversation is empty", "remove the record")
    messages: list[Message] = []
    for number, message in enumerate(value, start=1):
        where = f"{document.where}, message {number}"
        messages.append(_message(message, messages[-1]["role"] if messages else None, where))
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(
            f"{document.where}: no message is the assistant's, so nothing is supervised", "remove the record"
        )
    return messages


class MissingFieldError(DataError):
    """A record lacks a field."""


def field_of(document: Document, key: str, option: str) -> Any:
    """Return the value of field ``key``.

    Raises:
        MissingFieldError: there is no such field; names those there are, and the ``option`` that chooses it.
    """
    if key not in document.record:
        found = ", ".join(sorted(document.record)) or "none"
        problem, (_, _, argument) = f"{document.where}: no field {key!r} (fields: {found})", option.partition(".")
        raise MissingFieldError(problem, f"set {argument} to the right one", option)
    return document.record[key]


def is_weight(value: Any) -> bool:
    """Whether a value is a valid weight in the loss: a finite number that is not negative."""
    return isinstance(value, int | float) and 0 <= value <= _HEAVIEST


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
    if not given.get("tool_calls", True):
        del given["tool_calls"]  # an empty list, as tables have where others call
    if "content" not in given and "tool_calls" not in given:
        raise DataError(f"{where}: no content", "give it a string as content")
    return _with_thinking(_with_calls(_with_weight(given, where), where), where)


def _with_weight(message: Message, where: str) -> Message:
    weight = message.get("weight")
    if weight is None:
        return message
    if not is_weight(weight):
        raise DataError(f"{where}: weight {weight!r}", "use 0 (the message is not supervised) or a positive number")
    if message["role"] != "assistant":
        raise DataError(f"{where}: a weight, and only the assistant's messages are supervised", "remove the weight")
    return message


def _with_calls(message: Message, where: str) -> Message:
    """Return a message with the arguments of its calls as objects, which templates expect; OpenAI's API has text."""
    calls = message.get("tool_calls")
    if calls is None:
        return message
    if message["role"] != "assistant" or not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls are a list in a message of the assistant", "correct the message")
    return {**message, "tool_calls": [_call(call, where) for call in calls]}


def _call(call: Any, where: str) -> Any:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call without the name of a function", "write {function: {name, arguments}}")
    arguments = function.get("arguments", {})
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise DataError(
            f"{where}: the arguments of {function['name']} are not JSON: {error}", "correct them"
        ) from error
    if not isinstance(arguments, Mapping):
        raise DataError(f"{where}: the arguments of {function['name']} are no object", "write {name: value, ...}")
    return {**call, "type": "function", "function": {**function, "arguments": dict(arguments)}}


def _with_thinking(message: Message, where: str) -> Message:
    """Return a message with its thinking under the names that templates read."""
    found = [message[key] for key in _THINKING if key in message]
    if not found:
        return message
    if not isinstance(found[0], str) or message["role"] != "assistant":
        raise DataError(f"{where}: thinking is text in a message of the assistant", "correct the message")
    return {**message, "reasoning_content": found[0], "thinking": found[0]}


def _tools(document: Document) -> list[Any]:
    value = document.record.get(TOOLS_KEY)
    try:
        value = json.loads(value) if isinstance(value, str) and value else value
    except ValueError as error:
        raise DataError(f"{document.where}: field 'tools' is not JSON: {error}", "make it a list") from error
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(f"{document.where}: field 'tools' is no list of objects", "give the functions' JSON schemas")
    return value
