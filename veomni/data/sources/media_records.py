"""The media that the messages of a conversation hold, in order, and the messages as chat templates take them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from veomni.data.sources.records import MEDIA_KEYS, Conversation, Document, conversation_of
from veomni.errors import DataError
from veomni.families.omni import DECODERS

KINDS = tuple(MEDIA_KEYS)
"""``image``, ``video`` and ``audio``."""

_MARKS = re.compile(f"(<(?:{'|'.join(KINDS)})>)")
_REFERENCES = ("url", "path", "bytes", "base64")


@dataclass(frozen=True)
class MediaItem:
    """An item of a conversation: one of :data:`KINDS`, or of the decoder that generates it.

    A ``MediaReader`` reads ``reference``; errors name ``where``: file, record and message.
    """

    kind: str
    reference: Any
    where: str


def media_conversation(document: Document, key: str) -> tuple[Conversation, list[MediaItem]]:
    """Return a conversation whose contents are text or lists of ``{type: ...}`` parts, and its media in order.

    A content is text, in which ``<image>``, ``<video>`` and ``<audio>`` each stand for the next entry of the record's
    field ``images``, ``videos`` or ``audios`` (DataError: there are more or fewer); or a list of parts in the form of
    transformers or of OpenAI. A part without a reference stands for the next entry as well.
    """
    messages = document.record.get(key)
    if not isinstance(messages, list):
        return conversation_of(document, key), []  # raises
    columns = {kind: _column(document, key) for kind, key in MEDIA_KEYS.items()}
    contents: list[Any] = []
    items: list[MediaItem] = []
    for number, message in enumerate(messages, start=1):
        content = message.get("content") if isinstance(message, Mapping) else None
        contents.append(_parts(content, f"{document.where}, message {number}", columns, items))
    for kind, left in columns.items():
        if left:
            key, total = MEDIA_KEYS[kind], len(document.record[MEDIA_KEYS[kind]])
            problem = f"{document.where}: {total} {key}, and the messages have a place for {total - len(left)}"
            raise DataError(problem, f"write <{kind}> in a message for each, or remove what is too many")
    both = zip(messages, contents, strict=True)
    plain = [{**message, "content": "parts"} if isinstance(content, list) else message for message, content in both]
    conversation = conversation_of(Document({**document.record, key: plain}, document.where), key)
    for message, content in zip(conversation.messages, contents, strict=True):
        if isinstance(content, list):
            message["content"] = content
    return conversation, items


def texts_of(document: Document, key: str) -> list[str]:
    """Return the texts of a conversation's messages, without its media; errors as of :func:`media_conversation`."""
    conversation, _ = media_conversation(document, key)
    contents = [message["content"] for message in conversation.messages if "content" in message]
    parts = [content if isinstance(content, list) else [{"text": content}] for content in contents]
    return [part["text"] for content in parts for part in content if "text" in part]


def _column(document: Document, key: str) -> list[Any]:
    value = document.record.get(key)
    if not isinstance(value, list | None):
        raise DataError(f"{document.where}: field {key!r} is no list", "make it a list of paths")
    return list(value or [])


def _parts(content: Any, where: str, columns: dict[str, list[Any]], items: list[MediaItem]) -> Any:
    """Return a content as parts, if it has any, and take what they stand for."""
    if isinstance(content, str) and _MARKS.search(content):
        content = _split(content)
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        kind, value = _kind(part, where)
        if kind != "text":
            items.append(MediaItem(kind, _next(kind, columns, where) if value is None else value, where))
        parts.append({"type": kind, "text": value} if kind == "text" else {"type": kind})
    if not parts:
        raise DataError(f"{where}: the content is an empty list", "give it a part, or a string")
    return parts


def _split(text: str) -> list[dict[str, Any]]:
    pieces = enumerate(_MARKS.split(text))  # text and marks by turns
    return [{"type": piece[1:-1]} if at % 2 else {"type": "text", "text": piece} for at, piece in pieces if piece]


def _next(kind: str, columns: dict[str, list[Any]], where: str) -> Any:
    if not columns[kind]:
        problem = f"{where}: a place for one more {kind} than the field {MEDIA_KEYS[kind]!r} holds"
        raise DataError(problem, f"add it, or remove the mark; a text part may hold <{kind}> as it is")
    return columns[kind].pop(0)


def _kind(part: Any, where: str) -> tuple[str, Any]:
    """Return a part's kind, and its text or reference (None takes it from the record's field)."""
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise DataError(f"{where}: a part of the content has no type", "write {type: text, text: ...} or {type: image}")
    given = {name: value for name, value in part.items() if value is not None}
    kind = given["type"].removesuffix("_url").removeprefix("input_")
    if kind == "text":
        if not isinstance(given.get("text"), str):
            raise DataError(f"{where}: a part of type text without text", "give it a string")
        return "text", given["text"]
    if kind in DECODERS:  # what a composed model generates
        if kind not in given:
            raise DataError(f"{where}: a part of type {kind} without {kind}", f"write {{type: {kind}, {kind}: [...]}}")
        return kind, given[kind]
    if kind not in KINDS:
        known = ", ".join(("text", *KINDS, *DECODERS))
        raise DataError(f"{where}: a part of unknown type {part['type']!r}", f"use one of: {known}")
    if part["type"] == "input_audio":  # OpenAI's form of an audio clip
        return kind, {"base64": given.get("input_audio", {}).get("data")}
    references = {name: given[name] for name in _REFERENCES if name in given}
    return kind, given.get(kind, given.get(f"{kind}_url", references or None))
