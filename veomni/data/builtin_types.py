"""The data types of this package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from veomni.data.data_type import DATA_TYPES, DataType, Encoded, Records
from veomni.data.sources.formats import MESSAGES
from veomni.data.sources.media_records import texts_of
from veomni.data.sources.records import (
    MEDIA_KEYS,
    TOOLS_KEY,
    Document,
    conversation_of,
    field_of,
    messages_of,
    text_of,
)
from veomni.data.sources.schema import RecordSchema
from veomni.data.text.chat import tokenize_conversations
from veomni.data.text.preference import PREFERENCE_KEYS, pair_of, supervised_answer
from veomni.data.text.pretokenized import TOKEN_KEYS, given_tokens
from veomni.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_CONTEXT_LINES = 6


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
        return [text_of(document, schema.text_key)]

    @override
    def encode(self, documents: Records, schema: RecordSchema, tokenizer: Tokenizer, template: str) -> list[Encoded]:
        end = tokenizer.eos_token_id
        if end is None:
            raise DataError("the tokenizer has no eos_token, so documents have no end", "set tokenizer.eos_token")
        texts = [text_of(document, schema.text_key) for document in documents]
        batch = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        return [Encoded(ids if ids and ids[-1] == end else [*ids, end]) for ids in batch["input_ids"]]

    @override
    def prompt(self, document: Document, schema: RecordSchema, tokenizer: Tokenizer) -> str | None:
        text = text_of(document, schema.text_key)
        half = text[: len(text) // 2]
        return "\n".join(half.splitlines()[-_CONTEXT_LINES - 1 : -1]) or half


@DATA_TYPES.register("conversation")
class Dialogue(Plaintext):
    """Conversations, rendered by the chat template; the assistant's messages are supervised, by their weights."""

    marks = ()
    converts = renders = True

    @override
    def texts(self, document: Document, schema: RecordSchema) -> Iterable[str]:
        return [message["content"] for message in messages_of(document, MESSAGES) if "content" in message]

    @override
    def encode(self, documents: Records, schema: RecordSchema, tokenizer: Tokenizer, template: str) -> list[Encoded]:
        conversations = [conversation_of(document, MESSAGES) for document in documents]
        where = [document.where for document in documents]
        encoded = tokenize_conversations(conversations, where, tokenizer, template)
        return [Encoded(ids, weights) for ids, weights in encoded]

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

    @override
    def prompt(self, document: Document, schema: RecordSchema, tokenizer: Tokenizer) -> str | None:
        return None


@DATA_TYPES.register("pretokenized")
class Pretokenized(DataType):
    """Given ``input_ids``, supervised where ``labels`` are not ``IGNORE_INDEX``, weighted by ``loss_weights``."""

    marks = TOKEN_KEYS[:1]

    @override
    def columns(self, schema: RecordSchema) -> tuple[str, ...]:
        return TOKEN_KEYS

    @override
    def texts(self, document: Document, schema: RecordSchema) -> Iterable[str]:
        fix = "give the tokenizer that made the ids"
        raise DataError("no tokenizer can be trained on token ids", fix, field="build_tokenizer.path")

    @override
    def check(self, document: Document, schema: RecordSchema) -> None:
        field_of(document, TOKEN_KEYS[0], "RecordSchema.data_type")

    @override
    def encode(self, documents: Records, schema: RecordSchema, tokenizer: Tokenizer, template: str) -> list[Encoded]:
        return [given_tokens(document, len(tokenizer)) for document in documents]


@DATA_TYPES.register("preference")
class Preference(DataType):
    """Pairs of conversations that end in a better and a worse answer; those answers are supervised."""

    marks = PREFERENCE_KEYS[1:]
    renders = True
    cached = splittable = False

    @override
    def columns(self, schema: RecordSchema) -> tuple[str, ...]:
        return (*PREFERENCE_KEYS, TOOLS_KEY)

    @override
    def texts(self, document: Document, schema: RecordSchema) -> Iterable[str]:
        return (message["content"] for side in pair_of(document) for message in side.messages)

    @override
    def encode(self, documents: Records, schema: RecordSchema, tokenizer: Tokenizer, template: str) -> list[Encoded]:
        pairs = [pair_of(document) for document in documents]
        sides = []
        for side, name in enumerate(PREFERENCE_KEYS[1:]):
            where = [f"{document.where}, {name}" for document in documents]
            sides.append(tokenize_conversations([pair[side] for pair in pairs], where, tokenizer, template))
        return [
            Encoded(
                [*better[0], *worse[0]],
                [*supervised_answer(better[1]), *supervised_answer(worse[1])],
                first=len(better[0]),
            )
            for better, worse in zip(*sides, strict=True)
        ]
