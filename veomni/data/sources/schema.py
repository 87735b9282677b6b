"""What records of a source hold, and in which fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from veomni.data.sources.formats import FORMATS, MESSAGES, RecordFormat
from veomni.data.sources.media_records import texts_of
from veomni.data.sources.records import MEDIA_KEYS, TOOLS_KEY, Document, field_of, messages_of, text_of
from veomni.data.text.preference import PREFERENCE_KEYS, pair_of
from veomni.data.text.transforms import TRANSFORMS
from veomni.errors import DataError

_TOKENS = ("input_ids", "labels", "loss_weights")


@dataclass(frozen=True)
class RecordSchema:
    """What records hold.

    Attributes:
        data_type: Name of the transform, or ``multimodal``.
        format: Name of the record format of conversations.
        text_key: Field that holds the text (plaintext).
        messages_key: Field that holds the messages (conversation, multimodal).

    Raises:
        ConfigError: no transform or format has that name.
    """

    data_type: str = "plaintext"
    format: str = "messages"
    text_key: str = "text"
    messages_key: str = MESSAGES

    def __post_init__(self) -> None:
        FORMATS.get(self.format)
        if self.data_type != "multimodal":
            TRANSFORMS.get(self.data_type)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read from tables."""
        if self.data_type == "tokenized":
            return _TOKENS
        if self.data_type == "preference":
            return (*PREFERENCE_KEYS, TOOLS_KEY)
        return (self.text_key, self.messages_key, TOOLS_KEY, *MEDIA_KEYS.values(), *self._format.keys)

    @property
    def talks(self) -> bool:
        """Whether records hold conversations."""
        return self.data_type in ("conversation", "multimodal")

    @cached_property
    def _format(self) -> RecordFormat:
        return FORMATS.get(self.format)

    def converted(self, document: Document) -> Document:
        """Return a record with its conversation in the field ``messages``.

        Raises:
            DataError: it lacks a field, or is malformed.
        """
        if not self.talks or (self.format == "messages" and self.messages_key == MESSAGES):
            return document
        return self._format.convert(document, self.messages_key)

    def check(self, document: Document) -> None:
        """Look whether a converted record has its fields.

        Raises:
            DataError: it does not.
        """
        if self.data_type == "tokenized":
            field_of(document, _TOKENS[0], "data.data_type")
        else:
            next(self.texts(document), None)

    def texts(self, document: Document) -> Iterator[str]:
        """Yield the texts of a converted record: what a tokenizer is trained on.

        Raises:
            DataError: a field is missing or malformed, or the data has no text.
        """
        if self.data_type == "conversation":
            messages = messages_of(document, MESSAGES)
            yield from (message["content"] for message in messages if "content" in message)  # calls have none
        elif self.data_type == "multimodal":
            yield from texts_of(document, MESSAGES)
        elif self.data_type == "preference":
            yield from (message["content"] for side in pair_of(document) for message in side.messages)
        elif self.data_type == "tokenized":
            fix = "give the tokenizer that made them (model.tokenizer_path)"
            raise DataError("no tokenizer can be trained on data that is tokenised already", fix)
        else:
            yield text_of(document, self.text_key)

    def facts(self) -> list[str]:
        """Return what the documents made of a record depend on."""
        # The default format is left out: what was tokenised before there were others stays valid.
        known = [self.data_type, self.text_key, self.messages_key]
        return known if self.format == "messages" else [*known, self.format]
