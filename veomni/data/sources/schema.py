"""What the records of a source hold, and in which fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from veomni.data.data_type import DATA_TYPES, DataType
from veomni.data.sources.formats import FORMATS, MESSAGES, RecordFormat
from veomni.data.sources.records import MEDIA_KEYS, Document, MissingFieldError


@dataclass(frozen=True)
class RecordSchema:
    """What records hold.

    Attributes:
        data_type: Name of a registered data type: plaintext, conversation, multimodal, pretokenized, preference.
        format: Name of the record format of conversations: messages, sharegpt, alpaca.
        text_key: Field that holds the text (plaintext).
        messages_key: Field that holds the messages (conversation, multimodal).

    Raises:
        ConfigError: no data type or format has that name.
    """

    data_type: str = "plaintext"
    format: str = "messages"
    text_key: str = "text"
    messages_key: str = MESSAGES

    def __post_init__(self) -> None:
        FORMATS.get(self.format)
        DATA_TYPES.get(self.data_type)

    @cached_property
    def type(self) -> DataType:
        """The data type."""
        return DATA_TYPES.get(self.data_type)

    @cached_property
    def record_format(self) -> RecordFormat:
        """The record format."""
        return FORMATS.get(self.format)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read from tables."""
        return self.type.columns(self)

    def converted(self, document: Document) -> Document:
        """Return a record with its conversation, if it has one, in the field ``messages``.

        Raises:
            DataError: it lacks a field, or is malformed.
        """
        if not self.type.converts or (self.format == "messages" and self.messages_key == MESSAGES):
            return document
        with self._suggesting(document):
            return self.record_format.convert(document, self.messages_key)

    def check(self, document: Document) -> None:
        """Check that a converted record has its fields.

        Raises:
            DataError: it does not; the message says which data type its fields are those of.
        """
        with self._suggesting(document):
            if self.type.check is not None:
                self.type.check(document, self)
            else:
                next(iter(self.texts(document)), None)

    def texts(self, document: Document) -> Iterable[str]:
        """Return the texts of a converted record: what a tokenizer is trained on.

        Raises:
            DataError: a field is missing or malformed, or the data has no text.
        """
        return self.type.texts(document, self)

    def facts(self) -> list[str]:
        """Return what the documents made of a record depend on."""
        return [self.data_type, self.text_key, self.messages_key, self.format]

    @contextmanager
    def _suggesting(self, document: Document) -> Iterator[None]:
        """Name the schema that the fields of a record fit, where one of this schema's is missing."""
        try:
            yield
        except MissingFieldError as error:
            fitting = _fitting(document.record, self)
            if fitting is None:
                raise
            named = f"data_type {fitting.data_type!r}"
            named += f" and format {fitting.format!r}" if fitting.type.converts else ""
            field = "RecordSchema.data_type RecordSchema.format"
            raise MissingFieldError(error.problem, f"its fields are those of {named}: set these", field) from error


def _fitting(record: Mapping[str, Any], schema: RecordSchema) -> RecordSchema | None:
    """Return another schema that has all of its marks in a record, or None."""
    present = {name for name, value in record.items() if value is not None}
    media = present & set(MEDIA_KEYS.values())
    types = [name for name in DATA_TYPES if (marks := DATA_TYPES.get(name).marks) and present.issuperset(marks)]
    chats = [name for name in FORMATS if (marks := FORMATS.get(name).marks) and present.issuperset(marks)]
    kind = "multimodal" if media or schema.data_type == "multimodal" else "conversation"
    found = [RecordSchema(name) for name in types] + [RecordSchema(kind, format=name) for name in chats]
    return next(
        (one for one in reversed(found) if (one.data_type, one.format) != (schema.data_type, schema.format)), None
    )
