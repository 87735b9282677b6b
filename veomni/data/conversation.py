"""Conversations to tokens, and which of them the assistant wrote.

Rendering and tokenising are transformers' own (``apply_chat_template``). What the assistant wrote is marked by the
template with ``{% generation %}``, or else is the difference between the conversation up to a message and before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from veomni.data.records import Message
from veomni.errors import DataError
from veomni.logging import create_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = create_logger(__name__)

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the pattern transformers looks for

Conversation = list[Message]
Tokens = tuple[list[int], list[int]]  # ids, and 1 where the assistant wrote


def tokenize_conversations(
    conversations: Sequence[Conversation], where: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: str
) -> list[Tokens]:
    """Return the token ids of every conversation and 1 for every token that is the assistant's, else 0.

    Args:
        conversations: Checked messages.
        where: Names each conversation, for messages.
        tokenizer: A fast tokenizer: tokens are matched to what was rendered.
        template: Jinja source of the chat template.

    Raises:
        DataError: the template refuses a conversation, changes what it rendered before when messages are added, or
            marks no token of a conversation; or the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} cannot match tokens to text", "use a fast tokenizer (tokenizer.json)"
        )
    marked = bool(_MARK.search(template))
    if not marked:
        logger.warning_once(
            "the chat template has no {%% generation %%} marks: the assistant's part is found by prefixes"
        )
    encode = _by_marks if marked else _by_prefixes
    encoded = encode(conversations, where, tokenizer, template)
    for (_, mask), name in zip(encoded, where, strict=True):
        if not any(mask):
            raise DataError(
                f"{name}: the chat template leaves no token to learn", "set data.chat_template to one that does"
            )
    return encoded


def _by_marks(
    conversations: Sequence[Conversation], where: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: str
) -> list[Tokens]:
    from jinja2 import TemplateError

    def encode(chosen: Sequence[Conversation]) -> Any:
        return tokenizer.apply_chat_template(
            list(chosen), chat_template=template, return_dict=True, return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_attention_mask": False, "verbose": False},
        )  # fmt: skip

    try:
        batch = encode(conversations)
    except (TemplateError, TypeError):
        for conversation, name in zip(conversations, where, strict=True):  # which one was it?
            try:
                encode([conversation])
            except (TemplateError, TypeError) as error:
                raise _refused(name, error) from error
        raise
    return list(zip(batch["input_ids"], batch["assistant_masks"], strict=True))


def _by_prefixes(
    conversations: Sequence[Conversation], where: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: str
) -> list[Tokens]:
    rendered = [_render_with_spans(*pair, tokenizer, template) for pair in zip(conversations, where, strict=True)]
    batch = tokenizer(
        [text for text, _ in rendered], add_special_tokens=False, return_attention_mask=False,
        return_offsets_mapping=True, verbose=False,
    )  # fmt: skip
    masks = [_touched(offsets, spans) for offsets, (_, spans) in zip(batch["offset_mapping"], rendered, strict=True)]
    return list(zip(batch["input_ids"], masks, strict=True))


def _touched(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return 1 for every token that has a character in one of the spans."""
    return [int(any(start < stop and end > begin for begin, stop in spans)) for start, end in offsets]


def _render_with_spans(
    conversation: Conversation, where: str, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2 import TemplateError

    def render(messages: Conversation, prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        assert isinstance(text, str)
        return text

    spans = []
    try:
        whole = render(conversation, False)
        for index, message in enumerate(conversation):
            if message["role"] == "assistant":
                before, after = render(conversation[:index], True), render(conversation[: index + 1], False)
                _require_prefix(before, whole, f"{where}: the prompt before message {index + 1}")
                _require_prefix(after, whole, f"{where}: the conversation up to message {index + 1}")
                spans.append((len(before), len(after)))
    except (TemplateError, TypeError) as error:
        raise _refused(where, error) from error
    return whole, spans


def _require_prefix(part: str, whole: str, what: str) -> None:
    if whole.startswith(part):
        return
    at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    became = f"{part[at : at + 30]!r} becomes {whole[at : at + 30]!r}"
    raise DataError(
        f"{what} is rendered differently when more messages follow: {became}",
        "mark the assistant's part in the template with {% generation %}, or set data.chat_template to another one",
    )


def _refused(where: str, error: Exception) -> DataError:
    return DataError(
        f"{where}: the chat template refuses the conversation: {error}", "mend it, or change data.chat_template"
    )
