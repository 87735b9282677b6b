"""Ways that people write conversations down, each turned into messages with a role and a content."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from typing_extensions import override

from veomni.data.sources.records import Document, Message, field_of, from_json, text_of
from veomni.errors import DataError
from veomni.registry import Registry

MESSAGES = "messages"
"""The field in which converted records hold their messages."""


class RecordFormat:
    """How a record holds a conversation; the arguments of a subclass are its options in a configuration.

    ``keys`` are fields that are read, beside that of the messages; by ``marks`` such records are recognised, for the
    message about a missing field.
    """

    keys: ClassVar[tuple[str, ...]] = ()
    marks: ClassVar[tuple[str, ...]] = ()

    def messages(self, document: Document, key: str) -> Any:
        """Return the messages of a record, ``[{role, content}, ...]``; they are validated when they are read.

        The ``key`` is the schema's ``messages_key``. Raises DataError where a field is missing or malformed.
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
        question, answer = (text_of(document, name, "RecordSchema.format") for name in ("instruction", "output"))
        given = _optional(document, "input")
        history = document.record.get("history") or []
        asked = question + (f"\n{given}" if given else "")
        turns = [*(history if isinstance(history, list) else [history]), (asked, answer)]
        messages: list[Message] = []
        for number, turn in enumerate(turns, start=1):
            if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
                raise DataError(f"{document.where}: history {number} is no pair", "write [question, answer]")
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        return _with_system(document, messages)


def _with_system(document: Document, messages: list[Message]) -> list[Message]:
    system = _optional(document, "system")
    return [{"role": "system", "content": system}, *messages] if system else messages


def _optional(document: Document, key: str) -> str:
    return "" if document.record.get(key) is None else text_of(document, key)


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise DataError(f"{where}: not an object with from and value", "write {from: ..., value: ...}")
    role = _SPEAKERS.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise DataError(f"{where}: unknown speaker {turn['from']!r}", f"use one of: {', '.join(_SPEAKERS)}")
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    if role == "function_call":
        calls = from_json(turn["value"], f"{where}: the function call is not JSON", "write {name, arguments}")
        calls = calls if isinstance(calls, list) else [{"function": calls}]
        return {**rest, "role": "assistant", "tool_calls": calls}
    return {**rest, "role": role, "content": turn["value"]}
