"""What a document becomes: token ids, and which of them are learned. One transform per ``data.data_type``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from veomni.data.conversation import tokenize_conversations
from veomni.data.records import Document, conversation_of, text_of
from veomni.errors import DataError
from veomni.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TransformSettings:
    """What transforms are told.

    Attributes:
        text_key: Field that holds the text.
        messages_key: Field that holds the messages.
        chat_template: Jinja source; empty where no conversation is rendered.
    """

    text_key: str
    messages_key: str
    chat_template: str = ""


@dataclass(frozen=True)
class Encoded:
    """A tokenised document.

    Attributes:
        ids: Token ids.
        learned: 1 where a loss is taken, else 0; None learns all.
    """

    ids: list[int]
    learned: list[int] | None = None


Transform = Callable[[Sequence[Document], "PreTrainedTokenizerBase", TransformSettings], list[Encoded]]

TRANSFORMS: Registry[Transform] = Registry("data type")
"""Name to a function that tokenises a batch of documents."""


@TRANSFORMS.register("plaintext")
def plaintext(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, settings: TransformSettings
) -> list[Encoded]:
    """Tokenise texts as the tokenizer does by itself, and end each in its end-of-sequence token; learn every token.

    Raises:
        DataError: a field is missing or no text, or the tokenizer has no end-of-sequence token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no eos_token, so documents have no end", "set tokenizer.eos_token")
    texts = [text_of(document, settings.text_key) for document in documents]
    batch = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return [Encoded(ids if ids and ids[-1] == end else [*ids, end]) for ids in batch["input_ids"]]


@TRANSFORMS.register("conversation")
def conversation(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, settings: TransformSettings
) -> list[Encoded]:
    """Render conversations with the chat template and learn what the assistant says.

    Raises:
        DataError: a conversation is malformed, or the template cannot render it.
    """
    conversations = [conversation_of(document, settings.messages_key) for document in documents]
    where = [document.where for document in documents]
    encoded = tokenize_conversations(conversations, where, tokenizer, settings.chat_template)
    return [Encoded(ids, learned) for ids, learned in encoded]
