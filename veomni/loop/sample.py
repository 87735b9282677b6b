"""What an exported model generates from held-out data, read by transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veomni.data import IndexedDataset


def show_sample(directory: Path | str, documents: IndexedDataset | None, *, chat_template: str | None = None) -> None:
    """Print a prompt of the middle held-out document, and what the exported model in ``directory`` generates from it.

    The prompt of a conversation is all but its last message, through the chat template (a name, or the template; None
    takes the tokenizer's); that of a text is some lines before its middle. Of other data, of media and of streams
    nothing is printed. For one rank to call.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    from veomni.data.text.chat_templates import find_chat_template

    if documents is None or documents.schema.type.has_media:
        return
    tokenizer, schema = AutoTokenizer.from_pretrained(directory), documents.schema
    if schema.type.renders:
        tokenizer.chat_template = find_chat_template(chat_template, tokenizer)
    document = documents[len(documents) // 2]
    prompt = schema.type.prompt(document, schema, tokenizer)
    if prompt is None:
        return
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(0)
    tokens = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.4, top_p=0.9)
    generated = tokenizer.decode(tokens[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"--- held out, from {document.where}:\n{prompt}\n--- {directory} continues:\n{generated}", flush=True)
