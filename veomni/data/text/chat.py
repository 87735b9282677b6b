"""Conversations to text and to tokens, and what the loss of each weighs.

Rendering is transformers' own. What the assistant wrote is marked by the template with ``{% generation %}``, or else
is the difference between the conversation up to a message and before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from veomni.data.sources.records import Conversation
from veomni.errors import DataError
from veomni.logging import create_logger
from veomni.models.transformers_api.chat import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = create_logger(__name__)

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the pattern transformers looks for
_TEMPLATE = "Encoder.chat_template"

Render = Callable[..., tuple[str, list[tuple[int, int]]]]


class Span(NamedTuple):
    """Characters from ``start`` to before ``stop`` that the assistant wrote, and what the loss of its tokens weighs."""

    start: int
    stop: int
    weight: float = 1.0


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and where the assistant wrote what is supervised, in order."""

    text: str
    supervised: list[Span]


def render_conversation(
    conversation: Conversation, where: str, tokenizer: PreTrainedTokenizerBase, template: str
) -> Rendered:
    """Return a conversation as text; what the assistant wrote weighs its message's ``weight``, and 0 is not supervised.

    The ``template`` is Jinja source, whose variables are the tokenizer's special tokens; ``where`` is for messages. A
    conversation that it rejects, leaves out a part of, or changes when messages are added, is a DataError.
    """
    from jinja2 import TemplateError

    _check_places(conversation, where, template)
    find = _by_marks if _MARK.search(template) else _by_prefixes
    if find is _by_prefixes:
        logger.warning_once(
            "the chat template has no {%% generation %%} marks: the assistant's part is found by prefixes"
        )
    try:
        return find(conversation, where, partial(render_chat, tokenizer, template=template, tools=conversation.tools))
    except (TemplateError, TypeError) as error:
        problem = f"{where}: the chat template rejects the conversation: {error}"
        raise DataError(problem, "fix it, or use another chat_template", _TEMPLATE) from error


def _by_marks(conversation: Conversation, where: str, render: Render) -> Rendered:
    messages = conversation.messages
    text, blocks = render(messages, blocks=True)
    spans = [Span(*block) for block in blocks]
    for index, weight in enumerate(message.get("weight", 1) for message in messages):
        if weight == 1:
            continue
        first, stop = (len(render(messages[:count], blocks=True)[1]) if count else 0 for count in (index, index + 1))
        if stop == first:
            problem = f"{where}, message {index + 1}: its part is not to be found in what the chat template renders"
            raise DataError(problem, "remove its weight, or use another chat_template", _TEMPLATE)
        spans[first:stop] = [span._replace(weight=weight) for span in spans[first:stop]]
    return Rendered(text, [span for span in spans if span.start < span.stop and span.weight])


def _by_prefixes(conversation: Conversation, where: str, render: Render) -> Rendered:
    messages = conversation.messages
    whole, _ = render(messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(messages[:index], prompt=True)[0], render(messages[: index + 1])[0]
            _check_prefix(before, whole, f"{where}: the prompt before message {index + 1}")
            _check_prefix(after, whole, f"{where}: the conversation up to message {index + 1}")
            if weight := message.get("weight", 1):
                spans.append(Span(len(before), len(after), weight))
    return Rendered(whole, spans)


def _check_prefix(part: str, whole: str, what: str) -> None:
    if whole.startswith(part):
        return
    at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    became = f"{part[at : at + 30]!r} becomes {whole[at : at + 30]!r}"
    raise DataError(
        f"{what} is rendered differently when more messages follow: {became}",
        "mark the assistant's part in the template with {% generation %}, or use another chat_template",
        _TEMPLATE,
    )


def _check_places(conversation: Conversation, where: str, template: str) -> None:
    """Reject what the template would leave out without a word."""
    keys = {key for message in conversation.messages for key in message} | ({"tools"} if conversation.tools else set())
    for what, key, names in (
        ("tools", "tools", ("tools",)),
        ("tool calls", "tool_calls", ("tool_calls",)),
        ("thinking", "reasoning_content", ("reasoning_content", "thinking")),
    ):
        if key in keys and not any(name in template for name in names):
            problem = f"{where}: the conversation has {what}, and the chat template has no place for it"
            raise DataError(problem, "take the tokenizer's own template, or qwen3; or remove it")


def tokenize_conversations(
    conversations: Sequence[Conversation], where: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: str
) -> list[tuple[list[int], list[float]]]:
    """Render and tokenize conversations; see :func:`render_conversation` and :func:`tokenize_rendered`."""
    rendered = [render_conversation(*pair, tokenizer, template) for pair in zip(conversations, where, strict=True)]
    return tokenize_rendered(rendered, where, tokenizer)


def tokenize_rendered(
    rendered: Sequence[Rendered], where: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[float]]]:
    """Return the token ids of every conversation, and of each the largest weight among its characters.

    A conversation without a supervised token, and a tokenizer that is not a fast one, are a DataError.
    """
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise DataError(f"{kind} cannot match tokens to text", "use a fast tokenizer (tokenizer.json)")
    batch: Any = tokenizer(
        [one.text for one in rendered], add_special_tokens=False, return_attention_mask=False,
        return_offsets_mapping=True, verbose=False,
    )  # fmt: skip
    weights = [_weights(offsets, one) for offsets, one in zip(batch["offset_mapping"], rendered, strict=True)]
    for given, name in zip(weights, where, strict=True):
        if not any(given):
            fix = "give an answer a weight that is not 0, or use another chat_template"
            raise DataError(f"{name}: the chat template leaves no supervised token", fix, _TEMPLATE)
    return list(zip(batch["input_ids"], weights, strict=True))


def _weights(offsets: Sequence[tuple[int, int]], rendered: Rendered) -> list[float]:
    starts, stops = np.array(offsets, np.int64).reshape(-1, 2).T
    weights = np.zeros(len(starts))
    for start, stop, weight in rendered.supervised:
        touched = (starts < stop) & (stops > start)
        weights[touched] = np.maximum(weights[touched], weight)
    return weights.tolist()
