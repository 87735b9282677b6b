"""Chat templates, rendered as transformers' tokenizers render them."""

from collections.abc import Sequence
from typing import Any


def render_chat(
    tokenizer: Any, messages: Sequence[dict[str, Any]], template: str, tools: Sequence[Any] | None = None,
    *, prompt: bool = False, blocks: bool = False,
) -> tuple[str, list[tuple[int, int]]]:  # fmt: skip
    """Render messages, without values that are None, as ``apply_chat_template`` does with a Jinja ``template``.

    ``prompt`` ends with the head of the assistant's next message; ``blocks`` also returns first and last plus one
    character of every ``{% generation %}`` block, in order.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        [list(messages)], tools=list(tools) if tools else None, chat_template=template,
        return_assistant_tokens_mask=blocks, add_generation_prompt=prompt, **tokenizer.special_tokens_map,
    )  # fmt: skip
    texts, found = rendered
    return texts[0], [(start, end) for start, end in found[0]] if blocks else []
