"""Conversations to text, and which characters of it the assistant wrote.

Rendering is transformers' own. What the assistant wrote is marked by the template with ``{% generation %}``, or else
is the difference between the conversation up to a message and before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from veomni.data.sources.records import Conversation, Message
from veomni.errors import DataError
from veomni.logging import create_logger
from veomni.models.transformers_api.chat import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = create_logger(__name__)

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the pattern transformers looks for
_ANOTHER = "fix it, or use another chat_template"


class Span(NamedTuple):
    """Characters that the assistant wrote.

    Attributes:
        start: The first.
        stop: The last plus one.
        weight: What the loss of its tokens weighs.
    """

    start: int
    stop: int
    weight: float = 1.0


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: What is tokenized.
        learned: Where the assistant wrote what is supervised, in order.
    """

    text: str
    supervised: list[Span]


def render_conversation(
    conversation: Conversation, where: str, tokenizer: PreTrainedTokenizerBase, template: str
) -> Rendered:
    """Return a conversation as text; what the assistant wrote weighs its message's ``weight``, and 0 is not supervised.

    Args:
        conversation: Checked messages and tools.
        where: Names the conversation, for messages.
        tokenizer: Its special tokens are the template's variables.
        template: Jinja source of the chat template.

    Raises:
        DataError: the template rejects the conversation, has no place for a part of it, or changes what it rendered
            before when messages are added.
    """
    from jinja2 import TemplateError

    _check_rendered(conversation, where, template)
    marked = bool(_MARK.search(template))
    if not marked:
        logger.warning_once(
            "the chat template has no {%% generation %%} marks: the assistant's part is found by prefixes"
        )
    try:
        find = _by_marks if marked else _by_prefixes
        return find(conversation, where, _Renderer(tokenizer, template, conversation.tools, marked))
    except (TemplateError, TypeError) as error:
        problem = f"{where}: the chat template rejects the conversation: {error}"
        raise DataError(problem, _ANOTHER, "Encoder.chat_template") from error


@dataclass(frozen=True)
class _Renderer:
    tokenizer: PreTrainedTokenizerBase
    template: str
    tools: Sequence[Any]
    blocks: bool

    def __call__(self, messages: Sequence[Message], prompt: bool = False) -> tuple[str, list[Span]]:
        text, blocks = render_chat(
            self.tokenizer, messages, self.template, self.tools, prompt=prompt, blocks=self.blocks
        )
        return text, [Span(*block) for block in blocks]


def _by_marks(conversation: Conversation, where: str, render: _Renderer) -> Rendered:
    messages = conversation.messages
    text, blocks = render(messages)
    for index, weight in enumerate(message.get("weight", 1) for message in messages):
        if weight == 1:
            continue
        first, last = (len(render(messages[:count])[1]) if count else 0 for count in (index, index + 1))
        if last == first:
            problem = f"{where}, message {index + 1}: its part is not to be found in what the chat template renders"
            raise DataError(problem, "remove its weight, or use another chat_template", "Encoder.chat_template")
        blocks[first:last] = [block._replace(weight=weight) for block in blocks[first:last]]
    return Rendered(text, [block for block in blocks if block.start < block.stop and block.weight])


def _by_prefixes(conversation: Conversation, where: str, render: _Renderer) -> Rendered:
    messages = conversation.messages
    whole, _ = render(messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(messages[:index], True)[0], render(messages[: index + 1])[0]
            _require_prefix(before, whole, f"{where}: the prompt before message {index + 1}")
            _require_prefix(after, whole, f"{where}: the conversation up to message {index + 1}")
            if weight := message.get("weight", 1):
                spans.append(Span(len(before), len(after), weight))
    return Rendered(whole, spans)


def _require_prefix(part: str, whole: str, what: str) -> None:
    if whole.startswith(part):
        return
    at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    became = f"{part[at : at + 30]!r} becomes {whole[at : at + 30]!r}"
    raise DataError(
        f"{what} is rendered differently when more messages follow: {became}",
        "mark the assistant's part in the template with {% generation %}, or use another chat_template",
        "Encoder.chat_template",
    )


def _check_rendered(conversation: Conversation, where: str, template: str) -> None:
    """Reject what the template would leave out without a word."""
    present = {
        "tools": (bool(conversation.tools), ("tools",)),
        "tool calls": (any("tool_calls" in message for message in conversation.messages), ("tool_calls",)),
        "thinking": (
            any("reasoning_content" in message for message in conversation.messages), ("reasoning_content", "thinking")
        ),
    }  # fmt: skip
    for what, (used, names) in present.items():
        if used and not any(name in template for name in names):
            problem = f"{where}: the conversation has {what}, and the chat template has no place for it"
            raise DataError(problem, "take the tokenizer's own template, or qwen3; or remove it")
