"""What a record is and what becomes of it: the registry of data types, and those of this package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from veomni.data.sources import records
from veomni.data.sources.formats import MESSAGES
from veomni.data.sources.media_records import texts_of
from veomni.data.sources.records import MEDIA_KEYS, TOOLS_KEY, Document
from veomni.data.text.chat import tokenize_conversations
from veomni.data.text.preference import PREFERENCE_KEYS, pair_of, supervised_answer
from veomni.data.text.pretokenized import TOKEN_KEYS, given_tokens
from veomni.data.text.tokens import Tokens
from veomni.errors import DataError
from veomni.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from veomni.data.sources.schema import RecordSchema

Documents = Sequence[Document]
Encoded = list[Tokens]
"""The documents of a record: one, or two that stay together."""

_CONTEXT_LINES = 6


class DataType(ABC):
    """What a record is, and what becomes of it; the arguments of a subclass are its options in a configuration.

    Attributes:
        keys: Fields that are read from tables, where these do not depend on the schema.
        marks: Fields by which such records are recognised, for the message about a missing field.
        converts: Documents hold a conversation, which the record format converts.
        renders: Conversations are rendered by a chat template.
        has_media: A model family's processor encodes records, and not :meth:`encode`.
        cached: Documents are tokenized once and packed as a whole where they are indexed; otherwise while training.
        splittable: Documents longer than a row may be split.
    """

    keys: ClassVar[tuple[str, ...]] = ()
    marks: ClassVar[tuple[str, ...]] = ()
    converts: ClassVar[bool] = False
    renders: ClassVar[bool] = False
    has_media: ClassVar[bool] = False
    cached: ClassVar[bool] = True
    splittable: ClassVar[bool] = True

    def columns(self, schema: RecordSchema) -> tuple[str, ...]:
        """Return the fields that are read from tables."""
        return self.keys

    @abstractmethod
    def texts(self, document: Document, schema: RecordSchema) -> Iterable[str]:
        """Return the texts of a record, which a tokenizer is trained on; raises DataError if a field is missing."""

    def check(self, document: Document, schema: RecordSchema) -> None:
        """Raise DataError for a record without its fields."""
        next(iter(self.texts(document, schema)), None)

    @abstractmethod
    def encode(self, documents: Documents, schema: RecordSchema, tokenizer: Tokenizer, template: str) -> list[Encoded]:
        """Return the documents of each record; raises DataError for one that cannot be used.

        ``template`` is the chat template's Jinja source; empty where no conversation is rendered.
        """

    def prompt(self, document: Document, schema: RecordSchema, tokenizer: Tokenizer) -> str | None:
        """Return the beginning of a record, for a model to continue; None where text alone cannot show it."""
        return None


DATA_TYPES: Registry[type[DataType]] = Registry("data type", group="veomni.data_types")
"""Name to data type; ``@DATA_TYPES.register("name")`` above a subclass, or an entry point, adds one."""


@DATA_TYPES.register("plaintext")
class Plaintext(DataType):
    """Texts with the tokenizer's own special tokens, each ended by its end-of-sequence token; all are supervised."""

    marks: ClassVar[tuple[str, ...]] = ("text",)

    @override
    def columns(self, schema: RecordSchema) -> tuple[str, ...]:
        conversation = (schema.messages_key, TOOLS_KEY, *MEDIA_KEYS.values(), *schema.record_format.keys)
        return (schema.text_key, *conversation)  # a wrong data type is then recognised by the others

    @override
    def texts(self, document: Document, schema: RecordSchema) -> Iterable[str]:
        return [records.text_of(document, schema.text_key)]

    @override
    def encode(self, documents: Documents, schema: RecordSchema, tokenizer: Tokenizer, template: str) -> list[Encoded]:
        end = tokenizer.eos_token_id
        if end is None:
            raise DataError("the tokenizer has no eos_token, so documents have no end", "set tokenizer.eos_token")
        texts = [records.text_of(document, schema.text_key) for document in documents]
        batch = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        return [[Tokens.of(ids if ids and ids[-1] == end else [*ids, end])] for ids in batch["input_ids"]]

    @override
    def prompt(self, document: Document, schema: RecordSchema, tokenizer: Tokenizer) -> str | None:
        text = records.text_of(document, schema.text_key)
        half = text[: len(text) // 2]
        return "\n".join(half.splitlines()[-_CONTEXT_LINES - 1 : -1]) or half


@DATA_TYPES.register("conversation")
class Dialogue(Plaintext):
    """Conversations, rendered by the chat template; the assistant's messages are supervised, by their weights."""

    marks = ()
    converts = renders = True

    @override
    def texts(self, document: Document, schema: RecordSchema) -> Iterable[str]:
        return [message["content"] for message in records.messages_of(document, MESSAGES) if "content" in message]

    @override
    def encode(self, documents: Documents, schema: RecordSchema, tokenizer: Tokenizer, template: str) -> list[Encoded]:
        conversations = [records.conversation_of(document, MESSAGES) for document in documents]
        where = [document.where for document in documents]
        encoded = tokenize_conversations(conversations, where, tokenizer, template)
        return [[Tokens.of(*tokens)] for tokens in encoded]

    @override
    def prompt(self, document: Document, schema: RecordSchema, tokenizer: Tokenizer) -> str | None:
        turns = document.record[MESSAGES][:-1]
        return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


@DATA_TYPES.register("multimodal")
class Multimodal(Dialogue):
    """Conversations with images, videos and audio clips."""

    has_media = True
    cached = splittable = False

    @override
    def texts(self, document: Document, schema: RecordSchema) -> Iterable[str]:
        return texts_of(document, MESSAGES)


@DATA_TYPES.register("pretokenized")
class Pretokenized(DataType):
    """Given ``input_ids``, supervised where ``labels`` are not ``IGNORE_INDEX``, weighted by ``loss_weights``."""

    keys, marks = TOKEN_KEYS, TOKEN_KEYS[:1]

    @override
    def texts(self, document: Document, schema: RecordSchema) -> Iterable[str]:
        fix = "give the tokenizer that made the ids"
        raise DataError("no tokenizer can be trained on token ids", fix, field="build_tokenizer.path")

    @override
    def check(self, document: Document, schema: RecordSchema) -> None:
        records.field_of(document, TOKEN_KEYS[0], "RecordSchema.data_type")

    @override
    def encode(self, documents: Documents, schema: RecordSchema, tokenizer: Tokenizer, template: str) -> list[Encoded]:
        return [[given_tokens(document, len(tokenizer))] for document in documents]


@DATA_TYPES.register("preference")
class Preference(DataType):
    """Pairs of conversations that end in a better and a worse answer; those answers are supervised."""

    keys, marks = (*PREFERENCE_KEYS, TOOLS_KEY), PREFERENCE_KEYS[1:]
    renders = True
    cached = splittable = False

    @override
    def texts(self, document: Document, schema: RecordSchema) -> Iterable[str]:
        return (message["content"] for side in pair_of(document) for message in side.messages)

    @override
    def encode(self, documents: Documents, schema: RecordSchema, tokenizer: Tokenizer, template: str) -> list[Encoded]:
        pairs = [pair_of(document) for document in documents]
        sides = []
        for side, name in enumerate(PREFERENCE_KEYS[1:]):
            where = [f"{document.where}, {name}" for document in documents]
            encoded = tokenize_conversations([pair[side] for pair in pairs], where, tokenizer, template)
            sides.append([Tokens.of(ids, supervised_answer(weights)) for ids, weights in encoded])
        return [list(pair) for pair in zip(*sides, strict=True)]
