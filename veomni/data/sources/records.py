"""One document as its source gives it, and the checked ways to take text or messages out of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from veomni.errors import DataError

Message = dict[str, Any]

TOOLS_KEY = "tools"
"""Field of a record that holds the functions of a conversation."""

MEDIA_KEYS = {"image": "images", "video": "videos", "audio": "audios"}
"""Kinds of media, and the fields of a record that list those marked by ``<image>`` and so on in its messages."""

# Roles, and those they may follow; None is the start of the conversation.
_MAY_FOLLOW: dict[str, tuple[str | None, ...]] = {
    "system": (None,), "developer": (None, "system"), "user": (None, "system", "developer", "assistant"),
    "assistant": ("user", "tool"), "tool": ("assistant", "tool"),
}  # fmt: skip
_HEAVIEST = 3.4028234663852886e38  # of float32
_THINKING = ("reasoning_content", "thinking", "reasoning")  # its names in templates and data sets


@dataclass(frozen=True)
class Conversation:
    """Checked messages, without fields that are null, and the JSON schemas of functions they may call."""

    messages: list[Message]
    tools: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    """A record, and its file and place for messages: ``"train.jsonl, line 12"``."""

    record: Mapping[str, Any]
    where: str


class MissingFieldError(DataError):
    """A record lacks a field."""


def field_of(document: Document, key: str, option: str) -> Any:
    """Return the value of field ``key``; MissingFieldError, which names the ``option`` that chooses it, without one."""
    if key not in document.record:
        found = ", ".join(sorted(document.record)) or "none"
        problem, (_, _, argument) = f"{document.where}: no field {key!r} (fields: {found})", option.partition(".")
        raise MissingFieldError(problem, f"set {argument} to the right one", option)
    return document.record[key]


def text_of(document: Document, key: str, option: str = "RecordSchema.text_key") -> str:
    """Return the text in field ``key``, which ``option`` chooses; DataError where it is missing, null or not text."""
    value = field_of(document, key, option)
    if isinstance(value, str):
        return value
    problem = f"{document.where}: field {key!r} is {'null' if value is None else type(value).__name__}, not text"
    raise DataError(problem, "make it a string, or remove the record")


def from_json(value: Any, problem: str, fix: str) -> Any:
    """Return what a text holds as JSON; other values unchanged (DataError: the text is not JSON)."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{problem}: {error}", fix) from error


def conversation_of(document: Document, key: str) -> Conversation:
    """Return the conversation in field ``key`` with the functions in field ``tools``; DataError if one is malformed."""
    tools = document.record.get(TOOLS_KEY) or []
    tools = from_json(tools, f"{document.where}: field 'tools' is not JSON", "make it a list") or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{document.where}: field 'tools' is no list of objects", "give the functions' JSON schemas")
    return Conversation(messages_of(document, key), tools)


def messages_of(document: Document, key: str) -> list[Message]:
    """Return the messages in field ``key``, without the fields that are null.

    DataError where it is no list of messages, a role is unknown or out of order, one is malformed, or none is the
    assistant's.
    """
    value = field_of(document, key, "RecordSchema.messages_key")
    if not isinstance(value, list):
        raise DataError(f"{document.where}: field {key!r} is not a list", "make it a list of {role, content}")
    if not value:
        raise DataError(f"{document.where}: the conversation is empty", "remove the record")
    messages: list[Message] = []
    for number, message in enumerate(value, start=1):
        previous = messages[-1]["role"] if messages else None
        messages.append(_message(message, previous, f"{document.where}, message {number}"))
    if all(message["role"] != "assistant" for message in messages):
        problem = f"{document.where}: no message is the assistant's, so nothing is supervised"
        raise DataError(problem, "remove the record")
    return messages


def is_weight(value: Any) -> bool:
    """Whether a value is a valid weight in the loss: a finite number that is not negative."""
    return isinstance(value, int | float) and 0 <= value <= _HEAVIEST


def _message(message: Any, previous: str | None, where: str) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise DataError(f"{where}: not an object with a role and a content", "write {role: ..., content: ...}")
    _check_role(message["role"], previous, where)
    given = {key: value for key, value in message.items() if value is not None}
    if not isinstance(given.get("content", ""), str):
        raise DataError(f"{where}: content is {type(given['content']).__name__}, not text", "make it a string")
    if not given.get("tool_calls", True):
        del given["tool_calls"]  # an empty list, as tables have where others call
    if "content" not in given and "tool_calls" not in given:
        raise DataError(f"{where}: no content", "give it a string as content")
    _check_weight(given, where)
    return given | _calls(given, where) | _thinking(given, where)


def _check_role(role: Any, previous: str | None, where: str) -> None:
    if not isinstance(role, str) or role not in _MAY_FOLLOW:
        raise DataError(f"{where}: unknown role {role!r}", f"use one of: {', '.join(_MAY_FOLLOW)}")
    if previous not in _MAY_FOLLOW[role]:
        place = f"after {previous!r}" if previous else "first"
        fix = "order: [system], then user and assistant in turn"
        raise DataError(f"{where}: role {role!r} cannot come {place}", fix)


def _check_weight(message: Message, where: str) -> None:
    weight = message.get("weight", 1)
    if not is_weight(weight):
        raise DataError(f"{where}: weight {weight!r}", "use 0 (the message is not supervised) or a positive number")
    if "weight" in message and message["role"] != "assistant":
        raise DataError(f"{where}: a weight, and only the assistant's messages are supervised", "remove the weight")


def _calls(message: Message, where: str) -> Message:
    """Return calls with their arguments as objects, which templates expect; OpenAI's API has text."""
    calls = message.get("tool_calls")
    if calls is None:
        return {}
    if message["role"] != "assistant" or not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls are a list in a message of the assistant", "correct the message")
    return {"tool_calls": [_call(call, where) for call in calls]}


def _call(call: Any, where: str) -> Any:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call without the name of a function", "write {function: {name, arguments}}")
    what = f"{where}: the arguments of {function['name']} are"
    arguments = from_json(function.get("arguments", {}), f"{what} not JSON", "correct them")
    if not isinstance(arguments, Mapping):
        raise DataError(f"{what} no object", "write {name: value, ...}")
    return {**call, "type": "function", "function": {**function, "arguments": dict(arguments)}}


def _thinking(message: Message, where: str) -> Message:
    """Return thinking under the names that templates read."""
    found = [message[key] for key in _THINKING if key in message]
    if not found:
        return {}
    if not isinstance(found[0], str) or message["role"] != "assistant":
        raise DataError(f"{where}: thinking is text in a message of the assistant", "correct the message")
    return {"reasoning_content": found[0], "thinking": found[0]}
