"""What a record is and what becomes of it: the registry of data types."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from veomni.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from veomni.data.sources.records import Document
    from veomni.data.sources.schema import RecordSchema


@dataclass(frozen=True)
class EncodeOptions:
    """What an encoding depends on beside the tokenizer.

    Attributes:
        text_key: Field that holds the text.
        chat_template: Jinja source; empty for data types that render no conversation.
    """

    text_key: str = "text"
    chat_template: str = ""


@dataclass(frozen=True)
class Encoded:
    """A tokenized document.

    Attributes:
        ids: Token ids.
        weights: Weight of each token in the loss, 0 for tokens that are not supervised; None weighs all 1.
        first: Of a pair of documents that stay together, the tokens of the first; None for one document.
    """

    ids: list[int]
    weights: list[float] | None = None
    first: int | None = None


Encode = Callable[[Sequence["Document"], "PreTrainedTokenizerBase", EncodeOptions], list[Encoded]]


@dataclass(frozen=True)
class DataType:
    """What a record is, and what becomes of it.

    Attributes:
        columns: Given the schema, returns the fields that are read from tables.
        texts: Returns the texts of a record, which a tokenizer is trained on; raises DataError if a field is missing.
        encode: Tokenizes a batch of records; None where a model family's processor does (media).
        check: Raises DataError for a record without its fields; None reads its texts instead.
        marks: Fields by which such records are recognised, for the message about a missing field.
        converts: Records hold a conversation, which the record format converts.
        renders: Conversations are rendered by a chat template.
        cached: Records are tokenized once and packed as a whole where they are indexed; otherwise while training.
        splittable: Records longer than a row may be split.
    """

    columns: Callable[[RecordSchema], tuple[str, ...]]
    texts: Callable[[Document, RecordSchema], Iterable[str]]
    encode: Encode | None = None
    check: Callable[[Document, RecordSchema], None] | None = None
    marks: tuple[str, ...] = ()
    converts: bool = False
    renders: bool = False
    cached: bool = True
    splittable: bool = True


DATA_TYPES: Registry[DataType] = Registry("data type", group="veomni.data_types", home="veomni.data.builtin_types")
"""Name to data type; ``DATA_TYPES.register("name")(DataType(...))`` or an entry point adds one."""
