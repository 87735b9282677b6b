"""Records in the forms that people have them become the tokens that transformers makes of their messages."""

from __future__ import annotations

import json

import pytest

from tests.data.loaders import dataset_of, make_loader
from tests.data.stream_files import jsonl
from veomni.batch.fields import IGNORE_INDEX
from veomni.data import CHAT_TEMPLATES, FORMATS
from veomni.data.sources.formats import RecordFormat

USER, ANSWER = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}

CASES = {
    "messages": ("messages", {"messages": [SYSTEM, USER, ANSWER]}, {}, [SYSTEM, USER, ANSWER]),
    "messages elsewhere": ("messages", {"talk": [USER, ANSWER]}, {"messages_key": "talk"}, [USER, ANSWER]),
    "sharegpt": (
        "sharegpt", {"conversations": [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2."}],
                     "system": "Be brief."}, {}, [SYSTEM, USER, ANSWER]),
    "sharegpt elsewhere": (
        "sharegpt", {"items": [{"from": "system", "value": "Be brief."}, {"from": "user", "value": "Two?"},
                               {"from": "assistant", "value": "2."}]}, {"messages_key": "items"},
        [SYSTEM, USER, ANSWER]),
    "sharegpt with a weight": (
        "sharegpt", {"conversations": [
            {"from": "human", "value": "Two?"}, {"from": "gpt", "value": "3.", "weight": 0},
            {"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2."}]}, {},
        [USER, {"role": "assistant", "content": "3.", "weight": 0}, USER, ANSWER]),
    "sharegpt with a call": (
        "sharegpt", {"conversations": [
            {"from": "human", "value": "Two?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"}, {"from": "gpt", "value": "2."}]}, {"chat_template": "qwen3"},
        [USER, CALL, {"role": "tool", "content": "2"}, ANSWER]),
    "alpaca": ("alpaca", {"instruction": "Two?", "output": "2."}, {}, [USER, ANSWER]),
    "alpaca with all": (
        "alpaca", {"instruction": "Add", "input": "1 and 1", "output": "2.", "system": "Be brief.",
                   "history": [["Two?", "2."]]}, {},
        [SYSTEM, USER, ANSWER, {"role": "user", "content": "Add\n1 and 1"}, ANSWER]),
    "alpaca with nulls": (
        "alpaca", {"instruction": "Two?", "input": None, "output": "2.", "system": None, "history": None}, {},
        [USER, ANSWER]),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_form_gives_the_tokens_of_its_messages(case, streaming, tokenizer, tmp_path):
    form, record, options, messages = CASES[case]
    template = options.get("chat_template", "chatml")
    keys = {name: value for name, value in options.items() if name != "chat_template"}
    path = str(jsonl(tmp_path / "t.jsonl", [record]))
    dataset = dataset_of(path, data_type="conversation", format=form, streaming=streaming, **keys)
    loader = make_loader(
        dataset, tokenizer, max_seq_len=256, epochs=1, chat_template=template, pin_memory=False, stream_shards=1,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    ((micro,),) = loader
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATES.get(template), return_dict=True, return_assistant_tokens_mask=True
    )
    length = len(encoded["input_ids"])
    assert micro.rows.document_lengths == (length,)
    assert micro["input_ids"][0, :length].tolist() == encoded["input_ids"]
    learned = (micro["labels"][0, :length] != IGNORE_INDEX).int().tolist()
    if case == "sharegpt with a weight":
        assert sum(learned) == sum(encoded["assistant_masks"]) / 2
    else:
        assert learned == encoded["assistant_masks"]


def test_a_registered_form_is_read(tokenizer, tmp_path):
    @FORMATS.register("two-columns")
    class TwoColumns(RecordFormat):
        keys = ("q", "a")

        def messages(self, document, key):
            question = {"role": "user", "content": document.record["q"]}
            return [question, {"role": "assistant", "content": document.record["a"]}]

    path = str(jsonl(tmp_path / "t.jsonl", [{"q": "Two?", "a": "2."}]))
    dataset = dataset_of(path, data_type="conversation", format="two-columns")
    assert dataset[0].record["messages"] == [USER, ANSWER]


@pytest.mark.parametrize("streaming", [False, True])
def test_tokens_are_taken_as_they_are(streaming, tokenizer, tmp_path):
    rows = [
        {"input_ids": [5, 6, 7, 8]},
        {"input_ids": [9, 10, 11], "labels": [IGNORE_INDEX, 10, 11]},
        {"input_ids": [12, 13, 14], "labels": [IGNORE_INDEX, IGNORE_INDEX, 14]},
    ]
    dataset = dataset_of(str(jsonl(tmp_path / "t.jsonl", rows)), data_type="pretokenized", streaming=streaming)
    loader = make_loader(
        dataset, tokenizer, max_seq_len=4, epochs=1, strategy="none", shuffle=False, pin_memory=False, stream_shards=1,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    micros = [micro for step in loader for micro in step]
    ignore = IGNORE_INDEX
    assert [micro["input_ids"][0].tolist()[: micro.rows.document_lengths[0]] for micro in micros] == [
        row["input_ids"] for row in rows
    ]
    assert [micro["labels"][0].tolist() for micro in micros] == [
        [ignore, 6, 7, 8], [ignore, 10, 11, ignore], [ignore, ignore, 14, ignore]
    ]  # fmt: skip


PAIRS = {
    "texts": {"prompt": "Two?", "chosen": "2.", "rejected": "3."},
    "messages": {"prompt": [USER], "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "3."}]},
    "whole conversations": {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "3."}]},
    "more turns": {"prompt": [SYSTEM, USER, ANSWER, USER], "chosen": "2.", "rejected": "3."},
}


@pytest.mark.parametrize("case", PAIRS)
def test_a_pair_is_two_documents_of_a_row_that_learn_their_last_answer(case, tokenizer, tmp_path):
    rows = [PAIRS[case]] * 3
    dataset = dataset_of(str(jsonl(tmp_path / "t.jsonl", rows)), data_type="preference")
    loader = make_loader(
        dataset, tokenizer, max_seq_len=512, epochs=1, chat_template="chatml", pin_memory=False, stream_shards=1,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    prompt = PAIRS[case].get("prompt", [USER])
    prompt = [USER] if isinstance(prompt, str) else prompt
    at = 0
    ((micro,),) = loader
    for name, length in zip(micro.origin.document_ids, micro.rows.document_lengths, strict=True):
        answer = "2." if name.endswith("chosen") else "3."
        messages = [*prompt, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATES.get("chatml"))["input_ids"]
        assert micro["input_ids"][0, at : at + length].tolist() == ids
        labels = micro["labels"][0, at : at + length]
        assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == f"{answer}<|im_end|>"
        assert micro["position_ids"][0, at : at + length].tolist() == list(range(length))
        at += length
    assert [name.rpartition(", ")[2] for name in micro.origin.document_ids] == ["chosen", "rejected"] * 3


def test_pairs_that_are_too_long_lose_their_ends_and_are_never_split(tokenizer, tmp_path):
    rows = [{"prompt": "Two?", "chosen": "2. " * 40, "rejected": "3. " * 40}]
    dataset = dataset_of(str(jsonl(tmp_path / "t.jsonl", rows)), data_type="preference")
    options = {"max_seq_len": 64, "epochs": 1, "chat_template": "chatml", "pin_memory": False, "stream_shards": 1}
    loader = make_loader(dataset, tokenizer, on_overflow="truncate", cache_dir=tmp_path, **options)
    ((micro,),) = loader
    assert micro.rows.document_lengths == (32, 32)
    assert loader.source_counts()["data"]["lost"] > 64
    loader = make_loader(dataset, tokenizer, on_overflow="drop", cache_dir=tmp_path, **options)
    assert list(loader) == [] or not any(micro.origin.document_ids for step in loader for micro in step)
    assert loader.source_counts()["data"]["dropped"] == 1


def test_the_same_messages_in_another_form_are_the_same_data_type(tmp_path):
    path = jsonl(tmp_path / "t.json", [])
    path.write_text(json.dumps([{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}]))
    dataset = dataset_of(str(path), data_type="conversation", format="sharegpt")
    assert list(dataset.texts()) == ["x", "y"]
