from __future__ import annotations

import json

import pytest

from veomni.batch import IGNORE_INDEX
from veomni.data import CHAT_TEMPLATES, build_dataloader, build_dataset
from veomni.data.conversation import tokenize_conversations
from veomni.errors import DataError

TURNS = [
    {"role": "user", "content": "Where do rows end?"},
    {"role": "assistant", "content": "At the last token, naïvely ☃."},
    {"role": "user", "content": "And  documents?\n"},
    {"role": "assistant", "content": "Where positions restart."},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TURNS]
ANSWERS = [turn["content"] for turn in TURNS if turn["role"] == "assistant"]


def unmarked(template):
    return template.replace("{%- generation %}", "").replace("{% endgeneration %}", "")


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
    ends = {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
    end = ends.get(name, " <|endoftext|>")
    assert [tokenizer.decode(run).removeprefix(" ") for run in runs] == [answer + end for answer in ANSWERS]


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
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


def test_a_template_that_rewrites_the_past_is_refused(tokenizer):
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


def test_the_refused_conversation_is_named(tokenizer):
    odd = [TURNS[0], {"role": "assistant", "content": "ask"}, {"role": "tool", "content": "42"}]
    with pytest.raises(DataError, match="second: the chat template refuses the conversation: gemma has no role tool"):
        tokenize_conversations([TURNS, odd], ["first", "second"], tokenizer, CHAT_TEMPLATES.get("gemma"))


def test_batches_learn_only_the_answers(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": SYSTEM}) + "\n" + json.dumps({"messages": TURNS}) + "\n")
    dataset, _ = build_dataset(str(path), data_type="conversation")
    loader = build_dataloader(
        dataset, tokenizer, max_seq_len=256, epochs=1, cache_dir=tmp_path / "cache", shuffle=False
    )
    [[micro]] = list(loader)
    learned = micro["labels"][micro["labels"] != IGNORE_INDEX]
    assert tokenizer.decode(learned) == "<|im_end|>".join([*ANSWERS, *ANSWERS, ""])
