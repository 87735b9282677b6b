"""What a record is and what becomes of it: the registry of data types."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from veomni.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from veomni.data.sources.records import Document
    from veomni.data.sources.schema import RecordSchema

Records = Sequence["Document"]


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


class DataType:
    """What a record is, and what becomes of it; the arguments of a subclass are its options in a configuration.

    Attributes:
        marks: Fields by which such records are recognised, for the message about a missing field.
        converts: Records hold a conversation, which the record format converts.
        renders: Conversations are rendered by a chat template.
        has_media: A model family's processor encodes records, and not :meth:`encode`.
        cached: Records are tokenized once and packed as a whole where they are indexed; otherwise while training.
        splittable: Records longer than a row may be split.
    """

    marks: ClassVar[tuple[str, ...]] = ()
    converts: ClassVar[bool] = False
    renders: ClassVar[bool] = False
    has_media: ClassVar[bool] = False
    cached: ClassVar[bool] = True
    splittable: ClassVar[bool] = True

    def columns(self, schema: RecordSchema) -> tuple[str, ...]:
        """Return the fields that are read from tables."""
        raise NotImplementedError

    def texts(self, document: Document, schema: RecordSchema) -> Iterable[str]:
        """Return the texts of a record, which a tokenizer is trained on; raises DataError if a field is missing."""
        raise NotImplementedError

    def check(self, document: Document, schema: RecordSchema) -> None:
        """Raise DataError for a record without its fields."""
        next(iter(self.texts(document, schema)), None)

    def encode(self, documents: Records, schema: RecordSchema, tokenizer: Tokenizer, template: str) -> list[Encoded]:
        """Tokenize records; raises DataError for one that cannot be used.

        Args:
            documents: The records.
            schema: What they hold.
            tokenizer: With what.
            template: Jinja source; empty where no conversation is rendered.
        """
        raise NotImplementedError

    def prompt(self, document: Document, schema: RecordSchema, tokenizer: Tokenizer) -> str | None:
        """Return the beginning of a record, for a model to continue; None where text alone cannot show it."""
        return None


DATA_TYPES: Registry[type[DataType]] = Registry(
    "data type", group="veomni.data_types", home="veomni.data.builtin_types"
)
"""Name to data type; ``@DATA_TYPES.register("name")`` above a subclass, or an entry point, adds one."""
