"""Conversations are rendered as apply_chat_template renders them."""

from __future__ import annotations

from veomni.data import CHAT_TEMPLATES, train_byte_bpe
from veomni.models.transformers_api.chat import render_chat


def test_rendering_is_that_of_apply_chat_template():

    tokenizer = train_byte_bpe(["some text to learn from"], 300)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    template = CHAT_TEMPLATES.get("llava")  # it reads a special token
    text, blocks = render_chat(tokenizer, messages, template, blocks=True)
    assert text == tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert [text[start:end] for start, end in blocks] == [" bc<|endoftext|>"]
    text, blocks = render_chat(tokenizer, messages[:1], template, prompt=True)
    assert (text, blocks) == ("USER: a ASSISTANT:", [])
