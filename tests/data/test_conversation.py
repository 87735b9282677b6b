from __future__ import annotations

import json
import re
from itertools import groupby

import pytest

from tests.data.loaders import dataset_of, make_loader
from veomni.batch.fields import IGNORE_INDEX
from veomni.data import CHAT_TEMPLATES
from veomni.data.sources.records import Conversation, Document, conversation_of
from veomni.data.text.chat import tokenize_conversations as tokenize
from veomni.errors import DataError

TURNS = [
    {"role": "user", "content": "Where do rows end?"},
    {"role": "assistant", "content": "At the last token, naïvely ☃."},
    {"role": "user", "content": "And  documents?\n"},
    {"role": "assistant", "content": "Where positions restart."},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TURNS]
ANSWERS = [turn["content"] for turn in TURNS if turn["role"] == "assistant"]


def tokenize_conversations(conversations, where, tokenizer, template):
    return tokenize([Conversation(messages) for messages in conversations], where, tokenizer, template)


def unmarked(template):
    return re.sub(r"\{%-? (end)?generation %\}", "", template)


ENDS = {
    "llama2": " <|endoftext|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "gemma3": "<end_of_turn>",
    "llava": "<|endoftext|>",
}  # fmt: skip
CLOSED_BY_THE_LAST = ["glm4v", "gpt-oss", "qwen3"]  # what they render depends on whether a turn is the last


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
@pytest.mark.parametrize("conversation", [TURNS, SYSTEM], ids=["turns", "system"])
def test_marked_templates_equal_transformers(name, conversation, tokenizer):
    template = CHAT_TEMPLATES.get(name)
    [(ids, mask)] = tokenize_conversations([conversation], ["here"], tokenizer, template)
    expected = tokenizer.apply_chat_template(
        conversation, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    assert (ids, mask) == (expected["input_ids"], expected["assistant_masks"])


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
def test_what_is_learned_are_the_answers_and_their_ends(name, tokenizer):
    [(ids, mask)] = tokenize_conversations([SYSTEM], ["here"], tokenizer, CHAT_TEMPLATES.get(name))
    runs, previous = [], 0
    for token, learned in zip(ids, mask, strict=True):
        if learned:
            runs = [*runs[:-1], [*runs[-1], token]] if previous else [*runs, [token]]
        previous = learned
    end = ENDS.get(name, "<|im_end|>")
    expected = [answer + end for answer in ANSWERS]
    if name == "glm4v":
        expected = [ANSWERS[0], ANSWERS[1] + "<|endoftext|>"]
    if name == "gpt-oss":
        expected = [
            f"<|channel|>final<|message|>{a}{e}" for a, e in zip(ANSWERS, ("<|end|>", "<|return|>"), strict=True)
        ]
    assert [tokenizer.decode(run).removeprefix(" ") for run in runs] == expected


@pytest.mark.parametrize("name", [name for name in CHAT_TEMPLATES if name not in CLOSED_BY_THE_LAST])
@pytest.mark.parametrize("conversation", [TURNS, SYSTEM], ids=["turns", "system"])
def test_prefixes_find_the_same_as_marks_or_the_newline_after(name, conversation, tokenizer):
    marked = CHAT_TEMPLATES.get(name)
    [(ids, mask)] = tokenize_conversations([conversation], ["here"], tokenizer, marked)
    [(found, prefix_mask)] = tokenize_conversations([conversation], ["here"], tokenizer, unmarked(marked))
    assert found == ids
    extra = {token for token, a, b in zip(ids, mask, prefix_mask, strict=True) if a != b}
    assert tokenizer.decode(list(extra)) in ("", "\n")
    assert all(b >= a for a, b in zip(mask, prefix_mask, strict=True))


def test_published_formats():
    """Two rows of the model cards, written by hand."""
    from jinja2 import Environment

    def render(name, **tokens):
        source = unmarked(CHAT_TEMPLATES.get(name))
        return Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False).from_string(source).render(
            messages=[{"role": role, "content": role[0].upper()} for role in ("system", "user", "assistant")],
            **tokens,
        )  # fmt: skip

    assert render("llama2", bos_token="<s>", eos_token="</s>") == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s>"
    assert render("llama3", bos_token="<|begin_of_text|>") == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    )
    assert render("gemma", bos_token="<bos>") == (
        "<bos><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    )
    assert render("chatml") == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    )


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"function": {"name": "weather", "arguments": '{"city": "Ürümqi", "days": 2}'}}
CALLING = [
    {"role": "user", "content": "Will it rain?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "I must ask."},
    {"role": "tool", "content": "no"},
    {"role": "assistant", "content": "It will not.", "thinking": "Now I know."},
]


def read(messages, **fields):
    return conversation_of(Document({"messages": messages, **fields}, "here"), "messages")


def learned_runs(conversation, tokenizer, template):
    """What is learned, in pieces."""
    [(ids, mask)] = tokenize([conversation], ["here"], tokenizer, template)
    groups = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for learned, run in groups if learned]


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER])], ids=["list", "text"])
def test_calls_and_thinking_are_learned_and_results_are_not(tools, tokenizer):
    found = learned_runs(read(CALLING, tools=tools), tokenizer, CHAT_TEMPLATES.get("qwen3"))
    assert found == [
        "<think>\nI must ask.\n</think>\n\n<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Ürümqi", "days": 2}}\n</tool_call><|im_end|>',
        "<think>\nNow I know.\n</think>\n\nIt will not.<|im_end|>",
    ]


def test_gpt_oss_gives_calls_their_channel(tokenizer):
    found = learned_runs(read(CALLING), tokenizer, CHAT_TEMPLATES.get("gpt-oss"))
    assert found == [
        "<|channel|>analysis<|message|>I must ask.<|end|><|start|>assistant to=functions.weather"
        '<|channel|>commentary json<|message|>{"city": "Ürümqi", "days": 2}<|call|>',
        "<|channel|>analysis<|message|>Now I know.<|end|><|start|>assistant"
        "<|channel|>final<|message|>It will not.<|return|>",
    ]


def test_qwen3_leaves_the_thinking_of_answered_questions_out(tokenizer):
    turns = [TURNS[0], {**TURNS[1], "reasoning_content": "Old."}, TURNS[2], {**TURNS[3], "reasoning_content": "New."}]
    found = learned_runs(read(turns), tokenizer, CHAT_TEMPLATES.get("qwen3"))
    assert found == [f"{ANSWERS[0]}<|im_end|>", f"<think>\nNew.\n</think>\n\n{ANSWERS[1]}<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_tools_equal_transformers(name, tokenizer):
    tools = [WEATHER] if name == "qwen3" else []
    conversation = read(CALLING, tools=tools)
    [(ids, mask)] = tokenize([conversation], ["here"], tokenizer, CHAT_TEMPLATES.get(name))
    expected = tokenizer.apply_chat_template(
        conversation.messages, tools=tools or None, chat_template=CHAT_TEMPLATES.get(name), return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    assert (ids, mask) == (expected["input_ids"], expected["assistant_masks"])


@pytest.mark.parametrize("marks", [True, False], ids=["marks", "prefixes"])
@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen-vl", "gemma3"])
def test_turns_of_weight_0_are_not_learned(name, marks, tokenizer):
    template = CHAT_TEMPLATES.get(name) if marks else unmarked(CHAT_TEMPLATES.get(name))
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, TURNS[2], {**TURNS[3], "weight": 1}]
    [found] = learned_runs(read(turns), tokenizer, template)
    assert found.removesuffix("\n") == ANSWERS[1] + ENDS.get(name, "<|im_end|>")
    turns[1]["weight"], turns[3]["weight"] = 1, 0
    [found] = learned_runs(read(turns), tokenizer, template)
    assert found.removesuffix("\n") == ANSWERS[0] + ENDS.get(name, "<|im_end|>")


@pytest.mark.parametrize(
    ("messages", "fields", "name"),
    [(CALLING, {}, "chatml"), (TURNS, {"tools": [WEATHER]}, "llama3"), (TURNS, {"tools": [WEATHER]}, "gpt-oss"),
     ([TURNS[0], {**TURNS[1], "reasoning": "So."}], {}, "gemma")],
)  # fmt: skip
def test_what_a_template_would_leave_out_is_rejected(messages, fields, name, tokenizer):
    with pytest.raises(DataError, match=r"here: the conversation has (tools|tool calls|thinking), .* no place for it"):
        tokenize([read(messages, **fields)], ["here"], tokenizer, CHAT_TEMPLATES.get(name))


def test_a_template_that_rewrites_the_past_is_rejected(tokenizer):
    thinking = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
        "{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"train, line 7: .*up to message 2 is rendered differently.*<think>"):
        tokenize_conversations([TURNS], ["train, line 7"], tokenizer, thinking)
    [(_, mask)] = tokenize_conversations([TURNS[:2]], ["here"], tokenizer, thinking)
    assert any(mask), "with one answer nothing follows that could change it"


def test_the_rejected_conversation_is_named(tokenizer):
    odd = [TURNS[0], {"role": "assistant", "content": "ask"}, {"role": "tool", "content": "42"}]
    with pytest.raises(DataError, match="second: the chat template rejects the conversation: gemma has no role tool"):
        tokenize_conversations([TURNS, odd], ["first", "second"], tokenizer, CHAT_TEMPLATES.get("gemma"))


def test_batches_learn_only_the_answers(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": SYSTEM}) + "\n" + json.dumps({"messages": TURNS}) + "\n")
    dataset = dataset_of(str(path), data_type="conversation")
    loader = make_loader(dataset, tokenizer, max_seq_len=256, epochs=1, cache_dir=tmp_path / "cache", shuffle=False)
    [[micro]] = list(loader)
    learned = micro["labels"][micro["labels"] != IGNORE_INDEX]
    assert tokenizer.decode(learned) == "<|im_end|>".join([*ANSWERS, *ANSWERS, ""])
