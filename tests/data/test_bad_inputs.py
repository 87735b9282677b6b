"""Each row: what is in the files, how it is read, and what the error must say."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.loaders import dataset_of, make_loader
from veomni.data import build_dataset
from veomni.errors import ConfigError, DataError

CHAT = {"data_type": "conversation"}


def lines(*records):
    return "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records).encode()


def chat(*roles):
    return lines({"messages": [{"role": role, "content": "x"} for role in roles]})


GOOD = {"text": "fine"}
GOOD_CHAT = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
PARTS = {"role": "user", "content": [{"type": "image"}]}


def answer(**fields):
    """A conversation whose answer has these fields."""
    return lines({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", **fields}]})


IDS, TOKENS = {"data_type": "pretokenized"}, {"input_ids": [5, 6, 7]}
PARQUET = pa.BufferOutputStream()
pq.write_table(pa.table({"text": ["a", None]}), PARQUET)
NULL_PARQUET = PARQUET.getvalue().to_pybytes()
PARQUET = pa.BufferOutputStream()
pq.write_table(pa.table({"instruction": ["a"], "output": ["b"]}), PARQUET)
ALPACA_PARQUET = PARQUET.getvalue().to_pybytes()

CASES = {
    "malformed line": ("t.jsonl", lines(GOOD, "", '{"text": '), {}, DataError, r"t\.jsonl, line 3: not JSON"),
    "a line that is no object": ("t.jsonl", lines(GOOD, '["x"]'), {}, DataError, r"line 2: a list"),
    "non-UTF-8 line": ("t.jsonl", lines(GOOD) + b'{"text": "\xff"}\n', {}, DataError, r"line 2: byte 10 is not UTF-8"),
    "missing field": ("t.jsonl", lines(GOOD, {"body": "x"}), {}, DataError, r"line 2: no field 'text' .fields: body"),
    "null text": ("t.jsonl", lines(GOOD, {"text": None}), {}, DataError, r"line 2: field 'text' is null"),
    "number as text": ("t.jsonl", lines(GOOD, {"text": 3}), {}, DataError, r"line 2: field 'text' is int"),
    "null in parquet": ("t.parquet", NULL_PARQUET, {}, DataError, r"t\.parquet, record 2: field 'text' is null"),
    "parquet without the column": ("t.parquet", NULL_PARQUET, {"text_key": "b"}, DataError, r"no field 'b' .*text"),
    "damaged parquet": ("t.parquet", NULL_PARQUET[:-9], {}, DataError, r"t\.parquet: cannot be read"),
    "damaged arrow": ("t.arrow", b"ARROW1 no", {}, DataError, r"t\.arrow: cannot be read"),
    "non-UTF-8 text": ("t.txt", b"ab\xe9", {}, DataError, r"t\.txt: byte 2 is not UTF-8"),
    "empty file": ("t.jsonl", b"", {}, DataError, r"no document"),
    "only blank lines": ("t.jsonl", b"\n\n  \n", {}, DataError, r"no document"),
    "empty texts": ("t.txt", b"", {}, DataError, r"every document is empty"),
    "JSON that is no list": ("t.json", b'{"text": "x"}', {}, DataError, r"does not hold a list"),
    "malformed JSON": ("t.json", b'[{"text": "x"},\n]', {}, DataError, r"t\.json, line 2: not JSON"),
    "unknown data type": ("t.txt", b"x", {"data_type": "plaintxt"}, ConfigError, r"did you mean 'plaintext'"),
    "nothing held out": ("t.txt", b"x", {"eval_fraction": 0.5}, DataError, r"eval_fraction 0.5 of 1"),
    "unknown role": ("t.jsonl", chat("user", "bot"), CHAT, DataError, r"line 1, message 2: unknown role 'bot'"),
    "user twice": ("t.jsonl", chat("user", "user"), CHAT, DataError, r"message 2: role 'user' cannot come after"),
    "assistant first": ("t.jsonl", chat("assistant"), CHAT, DataError, r"role 'assistant' cannot come first"),
    "system later": ("t.jsonl", chat("user", "system"), CHAT, DataError, r"role 'system' cannot come after 'user'"),
    "nobody answers": ("t.jsonl", chat("system", "user"), CHAT, DataError, r"no message is the assistant's"),
    "empty conversation": ("t.jsonl", chat(), CHAT, DataError, r"line 1: the conversation is empty"),
    "messages as text": ("t.jsonl", lines({"messages": "hi"}), CHAT, DataError, r"'messages' is not a list"),
    "message as text": ("t.jsonl", lines({"messages": ["hi"]}), CHAT, DataError, r"message 1: not an object"),
    "content missing": ("t.jsonl", lines({"messages": [{"role": "user"}]}), CHAT, DataError, r"message 1: no content"),
    "content of parts": ("t.jsonl", lines({"messages": [PARTS]}), CHAT, DataError, r"message 1: content is list"),
    "a negative weight": ("t.jsonl", answer(weight=-0.5), CHAT, DataError, r"line 1, message 2: weight -0.5"),
    "a weight that is no number": ("t.jsonl", answer(weight=float("nan")), CHAT, DataError, r"message 2: weight nan"),
    "a weight beyond float32": ("t.jsonl", answer(weight=1e39), CHAT, DataError, r"message 2: weight 1e\+39"),
    "an endless weight": ("t.jsonl", answer(weight=float("inf")), CHAT, DataError, r"message 2: weight inf"),
    "a weight as text": ("t.jsonl", answer(weight="0.5"), CHAT, DataError, r"message 2: weight '0.5'"),
    "too few weights of tokens": ("t.jsonl", lines(TOKENS | {"loss_weights": [1, 2]}), IDS, DataError,
                                  r"line 1: field 'loss_weights' is no list of 3 numbers"),
    "weights of tokens as text": ("t.jsonl", lines(TOKENS | {"loss_weights": "111"}), IDS, DataError,
                                  r"line 1: field 'loss_weights' is no list of 3 numbers"),
    "a negative weight of a token": ("t.jsonl", lines(TOKENS, TOKENS | {"loss_weights": [1, -1, 1]}), IDS, DataError,
                                     r"line 2: weight 1 in field 'loss_weights' is -1"),
    "a weight of a token that is null": ("t.jsonl", lines(TOKENS | {"loss_weights": [1, 1, None]}), IDS, DataError,
                                         r"line 1: weight 2 in field 'loss_weights' is None"),
    "weight of a question": (
        "t.jsonl", lines({"messages": [{"role": "user", "content": "x", "weight": 1}]}), CHAT, DataError,
        r"message 1: a weight, and only the assistant's messages"),
    "every weight 0": ("t.jsonl", answer(weight=0), CHAT, DataError, r"line 1: the chat template leaves no"),
    "call without a name": ("t.jsonl", answer(tool_calls=[{}]), CHAT, DataError, r"tool call without the name"),
    "calls as text": ("t.jsonl", answer(tool_calls="f()"), CHAT, DataError, r"message 2: tool_calls are a list"),
    "arguments that are not JSON": (
        "t.jsonl", answer(tool_calls=[{"name": "f", "arguments": "{x"}]), CHAT, DataError, r"of f are not JSON"),
    "arguments as list": (
        "t.jsonl", answer(tool_calls=[{"name": "f", "arguments": "[1]"}]), CHAT, DataError, r"of f are no object"),
    "thinking as list": ("t.jsonl", answer(thinking=["x"]), CHAT, DataError, r"message 2: thinking is text"),
    "tools that are not JSON": (
        "t.jsonl", lines({"messages": GOOD_CHAT, "tools": "[{"}), CHAT, DataError, r"field 'tools' is not JSON"),
    "tools as object": (
        "t.jsonl", lines({"messages": GOOD_CHAT, "tools": {"a": 1}}), CHAT, DataError, r"'tools' is no list of obj"),
    "tools without a place": (
        "t.jsonl", lines({"messages": GOOD_CHAT, "tools": [{"name": "f"}]}), CHAT, DataError, r"has tools, and"),
    "text read as conversations": ("t.txt", b"x", CHAT, DataError, r"no field 'messages'(.|\n)*data_type 'plaintext'"),
    "conversations read as text": (
        "t.jsonl", chat("user", "assistant"), {}, DataError, r"data_type 'conversation' and format 'messages': set"),
    "ShareGPT read as messages": (
        "t.jsonl", lines({"conversations": []}), CHAT, DataError, r"data_type 'conversation' and format 'sharegpt'"),
    "Alpaca in Parquet read as text": ("t.parquet", ALPACA_PARQUET, {}, DataError, r"'conversation' and .* 'alpaca'"),
    "conversations with images read as text": (
        "t.jsonl", lines({"messages": [], "images": ["a.png"]}), {}, DataError, r"data_type 'multimodal' and format"),
    "pairs read as text": ("t.jsonl", lines({"chosen": "x", "rejected": "y"}), {}, DataError, r"type 'preference'"),
    "token ids read as text": ("t.jsonl", lines(TOKENS), {}, DataError, r"data_type 'pretokenized'"),
    "comma-separated values": ("t.csv", b"text\nx\n", {}, DataError, r"t\.csv: \.csv tables are not (.|\n)*JSONL"),
    "tab-separated values": ("t.tsv", b"text\nx\n", {}, DataError, r"\.tsv tables are not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_data_is_named(case, tokenizer, tmp_path):
    name, content, options, kind, message = CASES[case]
    path, cache = tmp_path / name, tmp_path / "cache"
    path.write_bytes(content)

    def use():
        dataset = dataset_of(str(path), **options)
        make_loader(dataset, tokenizer, cache_dir=cache)

    with pytest.raises(kind, match=message) as raised:
        use()
    assert raised.value.fix
    left = list(cache.iterdir()) if cache.exists() else []
    assert all(path.suffix == ".lock" for path in left), "nothing half-made is left"


def test_missing_path():
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        build_dataset(["nowhere.jsonl"])


def test_empty_directory(tmp_path):
    with pytest.raises(DataError, match="no document"):
        build_dataset(str(tmp_path))


LOADER_CASES = {
    "on_overflow": (
        {"max_seq_len": 16},
        DataError,
        r"t\.jsonl, line 2: \d+ tokens, more than .* 16 \(1 such",
    ),
    "all overlong": ({"max_seq_len": 2, "on_overflow": "drop"}, DataError, r"every document is longer"),
    "unknown policy": ({"on_overflow": "cut"}, ConfigError, r"no policy is called 'cut'"),
    "unknown packing": ({"strategy": "bestfit"}, ConfigError, r"did you mean 'best_fit'"),
    "unknown template": ({"chat_template": "chatm"}, ConfigError, r"did you mean 'chatml'"),
    "no template": ({"chat_template": None}, DataError, r"the tokenizer has no chat template"),
}


@pytest.mark.parametrize("case", LOADER_CASES)
def test_bad_options_are_named(case, tokenizer, tmp_path):
    options, kind, message = LOADER_CASES[case]
    conversation = "chat_template" in options
    path = tmp_path / "t.jsonl"
    path.write_bytes(chat("user", "assistant") if conversation else lines(GOOD, {"text": "x1" * 40}))
    dataset = dataset_of(str(path), data_type="conversation" if conversation else "plaintext")
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = None
        with pytest.raises(kind, match=message):
            make_loader(dataset, tokenizer, cache_dir=tmp_path / "cache", **options)
    finally:
        tokenizer.chat_template = own


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    from veomni.data import train_byte_bpe

    tokenizer = train_byte_bpe(["some text"], 269)
    tokenizer.eos_token = None
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(DataError, match="no eos_token"):
        make_loader(dataset_of(str(tmp_path / "t.txt")), tokenizer, cache_dir=tmp_path / "cache")
