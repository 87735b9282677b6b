"""What the records of a source hold, and in which fields."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

from annotated_types import MinLen

from veomni.data.data_type import DATA_TYPES, DataType
from veomni.data.sources.formats import FORMATS, MESSAGES, RecordFormat
from veomni.data.sources.records import MEDIA_KEYS, Document, MissingFieldError


@dataclass(frozen=True)
class RecordSchema:
    """What records hold (ConfigError: no data type or format has that name).

    Attributes:
        data_type: A data type, or the name of a registered one: plaintext, conversation, multimodal, pretokenized,
            preference.
        format: How records hold conversations, or the name of a registered record format: messages, sharegpt, alpaca.
        text_key: Field of a record that holds the text (plaintext).
        messages_key: Field of a record that holds the messages (conversation, multimodal).
    """

    data_type: DataType | str = "plaintext"
    format: RecordFormat | str = "messages"
    text_key: Annotated[str, MinLen(1)] = "text"
    messages_key: Annotated[str, MinLen(1)] = MESSAGES

    def __post_init__(self) -> None:
        _ = self.type, self.record_format

    @cached_property
    def type(self) -> DataType:
        """The data type."""
        return DATA_TYPES.get(self.data_type)() if isinstance(self.data_type, str) else self.data_type

    @cached_property
    def record_format(self) -> RecordFormat:
        """The record format."""
        return FORMATS.get(self.format)() if isinstance(self.format, str) else self.format

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read from tables."""
        return self.type.columns(self)

    def converted(self, document: Document) -> Document:
        """Return a record with its conversation, if it has one, in ``messages`` (DataError: it is malformed)."""
        if not self.type.converts:
            return document
        with self._suggesting(document):
            messages = self.record_format.messages(document, self.messages_key)
        return replace(document, record={**document.record, MESSAGES: messages})

    def check(self, document: Document) -> None:
        """Raise DataError for a converted record without its fields; it names the data type that they are those of."""
        with self._suggesting(document):
            self.type.check(document, self)

    def facts(self) -> list[str]:
        """Return what the documents made of a record depend on."""
        chosen = [f"{type(one).__qualname__} {vars(one)}" for one in (self.type, self.record_format)]
        return [*chosen, self.text_key, self.messages_key]

    @contextmanager
    def _suggesting(self, document: Document) -> Iterator[None]:
        """Name the data type and format that the fields of a record fit, where one of this schema's is missing."""
        try:
            yield
        except MissingFieldError as error:
            present = {name for name, value in document.record.items() if value is not None}
            found = self._other_fitting(present)
            if found is None:
                raise
            field = "RecordSchema.data_type RecordSchema.format"
            raise MissingFieldError(error.problem, f"its fields are those of {found}: set these", field) from error

    def _other_fitting(self, present: set[str]) -> str | None:
        """Return another data type, with a format if it has one, all of whose marks are fields of a record."""
        types = {name: DATA_TYPES.get(name) for name in DATA_TYPES}
        formats = {name: FORMATS.get(name) for name in FORMATS}
        media = self.type.has_media or not present.isdisjoint(MEDIA_KEYS.values())
        talks = next(name for name, one in types.items() if one.converts and one.has_media == media)
        for name, form in reversed(formats.items()):
            same = type(self.record_format) is form and type(self.type) is types[talks]
            if form.marks and present.issuperset(form.marks) and not same:
                return f"data_type {talks!r} and format {name!r}"
        for name, one in reversed(types.items()):
            if one.marks and present.issuperset(one.marks) and type(self.type) is not one:
                return f"data_type {name!r}"
        return None
