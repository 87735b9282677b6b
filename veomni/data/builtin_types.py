"""The data types of this package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from veomni.data.data_type import DATA_TYPES, DataType
from veomni.data.sources.formats import MESSAGES
from veomni.data.sources.media_records import texts_of
from veomni.data.sources.records import MEDIA_KEYS, TOOLS_KEY, Document, field_of, messages_of, text_of
from veomni.data.sources.schema import RecordSchema
from veomni.data.text import encode
from veomni.data.text.preference import PREFERENCE_KEYS, pair_of
from veomni.errors import DataError


def _text_columns(schema: RecordSchema) -> tuple[str, ...]:
    return (schema.text_key, *_chat_columns(schema))  # a wrong data type is then recognised by the others


def _chat_columns(schema: RecordSchema) -> tuple[str, ...]:
    return (schema.messages_key, TOOLS_KEY, *MEDIA_KEYS.values(), *schema.record_format.keys)


def _chat_texts(document: Document, schema: RecordSchema) -> list[str]:
    return [message["content"] for message in messages_of(document, MESSAGES) if "content" in message]


def _pair_texts(document: Document, schema: RecordSchema) -> Iterable[str]:
    return (message["content"] for side in pair_of(document) for message in side.messages)


def _no_texts(document: Document, schema: RecordSchema) -> NoReturn:
    fix = "give the tokenizer that made the ids"
    raise DataError("no tokenizer can be trained on token ids", fix, field="build_tokenizer.path")


DATA_TYPES.register("plaintext")(
    DataType(
        _text_columns, lambda document, schema: [text_of(document, schema.text_key)], encode.plaintext, marks=("text",)
    )
)
DATA_TYPES.register("conversation")(
    DataType(_text_columns, _chat_texts, encode.conversation, converts=True, renders=True)
)
DATA_TYPES.register("multimodal")(
    DataType(
        _text_columns, lambda document, schema: texts_of(document, MESSAGES), converts=True, renders=True, cached=False,
        splittable=False,
    )
)  # fmt: skip
DATA_TYPES.register("pretokenized")(
    DataType(
        lambda schema: encode.TOKEN_KEYS, _no_texts, encode.pretokenized,
        check=lambda document, schema: field_of(document, encode.TOKEN_KEYS[0], "RecordSchema.data_type"),
        marks=encode.TOKEN_KEYS[:1],
    )
)  # fmt: skip
DATA_TYPES.register("preference")(
    DataType(
        lambda schema: (*PREFERENCE_KEYS, TOOLS_KEY), _pair_texts, encode.preference, marks=PREFERENCE_KEYS[1:],
        renders=True, cached=False, splittable=False,
    )
)  # fmt: skip
