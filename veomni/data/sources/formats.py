"""Ways that people write conversations down, each turned into messages with a role and a content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from typing_extensions import override

from veomni.data.sources.records import Document, Message, field_of
from veomni.errors import DataError
from veomni.registry import Registry

MESSAGES = "messages"
"""The field in which converted records hold their messages."""


class RecordFormat:
    """How a record holds a conversation; the arguments of a subclass are its options in a configuration.

    Attributes:
        keys: Fields that are read, beside that of the messages.
        marks: Fields by which such records are recognised, for the message about a missing field.
    """

    keys: ClassVar[tuple[str, ...]] = ()
    marks: ClassVar[tuple[str, ...]] = ()

    def messages(self, document: Document, key: str) -> Any:
        """Return the messages of a record, ``[{role, content}, ...]``; they are validated when they are read.

        Args:
            document: The record.
            key: ``messages_key`` of the schema.

        Raises:
            DataError: a field is missing or malformed.
        """
        raise NotImplementedError


FORMATS: Registry[type[RecordFormat]] = Registry("record format", group="veomni.formats")
"""Name to format; ``@FORMATS.register("name")`` above a subclass, or an entry point, adds one."""

_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "function_call",
}  # fmt: skip


@FORMATS.register("messages")
class Messages(RecordFormat):
    """OpenAI's form: ``{key: [{role, content}, ...]}``."""

    marks = (MESSAGES,)

    @override
    def messages(self, document: Document, key: str) -> Any:
        return field_of(document, key, "RecordSchema.messages_key")


@FORMATS.register("sharegpt")
class ShareGPT(RecordFormat):
    """ShareGPT's form: ``{conversations: [{from, value}, ...], system: ..., tools: ...}``.

    The field is ``conversations``, unless ``messages_key`` names another.
    """

    keys = ("conversations", "system")
    marks = keys[:1]

    @override
    def messages(self, document: Document, key: str) -> Any:
        field = "conversations" if key == MESSAGES else key
        turns = field_of(document, field, "RecordSchema.messages_key")
        if not isinstance(turns, list):
            raise DataError(f"{document.where}: field {field!r} is not a list", "make it a list of {from, value}")
        messages = [_turn(turn, f"{document.where}, message {number}") for number, turn in enumerate(turns, start=1)]
        return _with_system(document, messages)


@FORMATS.register("alpaca")
class Alpaca(RecordFormat):
    """Alpaca's form: ``{instruction, input, output, system, history: [[question, answer], ...]}``."""

    keys = ("instruction", "input", "output", "system", "history")
    marks = ("instruction", "output")

    @override
    def messages(self, document: Document, key: str) -> Any:
        question, answer = _text(document, "instruction", True), _text(document, "output", True)
        given = _text(document, "input", False)
        messages: list[Message] = []
        history = document.record.get("history") or []
        for number, pair in enumerate(history if isinstance(history, list) else [history], start=1):
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise DataError(f"{document.where}: history {number} is no pair", "write [question, answer]")
            messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        messages += [
            {"role": "user", "content": f"{question}\n{given}" if given else question},
            {"role": "assistant", "content": answer},
        ]
        return _with_system(document, messages)


def _with_system(document: Document, messages: list[Message]) -> list[Message]:
    system = _text(document, "system", False)
    return [{"role": "system", "content": system}, *messages] if system else messages


def _text(document: Document, key: str, required: bool) -> str:
    value = field_of(document, key, "RecordSchema.format") if required else document.record.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{document.where}: field {key!r} is {kind}, not text", "make it a string")
    return value


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise DataError(f"{where}: not an object with from and value", "write {from: ..., value: ...}")
    role = _SPEAKERS.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise DataError(f"{where}: unknown speaker {turn['from']!r}", f"use one of: {', '.join(_SPEAKERS)}")
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    if role == "function_call":
        return {**rest, "role": "assistant", "tool_calls": _calls(turn["value"], where)}
    return {**rest, "role": role, "content": turn["value"]}


def _calls(value: Any, where: str) -> list[Any]:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{where}: the function call is not JSON: {error}", "write {name, arguments}") from error
    return calls if isinstance(calls, list) else [{"function": calls}]
