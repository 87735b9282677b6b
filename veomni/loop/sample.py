"""What an exported model generates from held-out data, read by transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veomni.data.sources.records import Document

_CONTEXT_LINES = 6


def show_sample(
    directory: Path | str, document: Document, *, chat_template: str | None = None, max_new_tokens: int = 100
) -> None:
    """Print a prompt of a held-out document and what the model generates from it; for one rank to call.

    The prompt of a conversation is all but its last answer, through the chat template; that of a text is some lines
    before its middle.

    Args:
        directory: An exported language model with its tokenizer.
        document: The held-out document.
        chat_template: Name of a chat template, or the template; None takes the tokenizer's.
        max_new_tokens: Longest answer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = _prompt(document, tokenizer, chat_template)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(0)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=True, temperature=0.6, top_p=0.9)
    generated = tokenizer.decode(tokens[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"--- held out, from {document.where}:\n{prompt}\n--- {directory} continues:\n{generated}", flush=True)


def _prompt(document: Document, tokenizer: Any, chat_template: str | None) -> str:
    messages: Sequence[dict[str, Any]] | None = document.record.get("messages")
    if messages is None:
        (text,) = (value for value in document.record.values() if isinstance(value, str))
        return "\n".join(text[: len(text) // 2].splitlines()[-_CONTEXT_LINES - 1 : -1])
    from veomni.data.text.chat_templates import find_chat_template

    tokenizer.chat_template = find_chat_template(chat_template, tokenizer)
    return str(tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False))
