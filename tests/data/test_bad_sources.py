"""Each row: what is in a file or asked of a mixture, and what the error must say; indexed and streamed."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pyarrow as pa
import pytest

from tests.data.loaders import dataset_of, make_loader
from tests.data.stream_files import add
from veomni.data import DataSource, RecordSchema, build_mixture
from veomni.errors import ConfigError, DataError

USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
SHARE = {"data_type": "conversation", "format": "sharegpt"}
ALPACA = {"data_type": "conversation", "format": "alpaca"}
TOKENS, PAIRS = {"data_type": "pretokenized"}, {"data_type": "preference"}
GOOD_TURNS = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def tar(*members, **facts):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, body in members:
            add(archive, name, body, **facts)
    return content.getvalue()


def share(*turns, **fields):
    return lines({"conversations": list(turns), **fields})


CASES = {
    # ShareGPT
    "no conversations": ("t.jsonl", lines({"talk": []}), SHARE, r"(line 1|byte 0): no field 'conversations' .*talk"),
    "conversations as text": ("t.jsonl", lines({"conversations": "x"}), SHARE, r"'conversations' is not a list"),
    "turn without value": ("t.jsonl", share({"from": "human"}), SHARE, r"message 1: not an object with from"),
    "turn as text": ("t.jsonl", share("hi"), SHARE, r"message 1: not an object with from"),
    "unknown speaker": ("t.jsonl", share({"from": "alien", "value": "x"}), SHARE, r"unknown speaker 'alien'"),
    "speaker as number": ("t.jsonl", share({"from": 3, "value": "x"}), SHARE, r"message 1: unknown speaker 3"),
    "turns out of order": ("t.jsonl", share(*GOOD_TURNS[::-1]), SHARE, r"role 'assistant' cannot come first"),
    "value as number": ("t.jsonl", share({"from": "human", "value": 3}), SHARE, r"message 1: content is int, not text"),
    "call that is no JSON": (
        "t.jsonl", share(GOOD_TURNS[0], {"from": "function_call", "value": "{x"}), SHARE, r"function call is not JSON"),
    "system as list": ("t.jsonl", share(*GOOD_TURNS, system=["x"]), SHARE, r"field 'system' is list, not text"),
    # Alpaca
    "no instruction": ("t.jsonl", lines({"output": "x"}), ALPACA, r"no field 'instruction' .fields: output"),
    "no output": ("t.jsonl", lines({"instruction": "x"}), ALPACA, r"no field 'output'"),
    "null output": ("t.jsonl", lines({"instruction": "x", "output": None}), ALPACA, r"'output' is null, not text"),
    "input as number": (
        "t.jsonl", lines({"instruction": "x", "input": 1, "output": "y"}), ALPACA, r"field 'input' is int, not text"),
    "history of single texts": (
        "t.jsonl", lines({"instruction": "x", "output": "y", "history": ["z"]}), ALPACA, r"history 1 is no pair"),
    # token ids
    "no ids": ("t.jsonl", lines({"text": "x"}), TOKENS, r"no field 'input_ids' .fields: text"),
    "ids as text": ("t.jsonl", lines({"input_ids": "1 2"}), TOKENS, r"'input_ids' is no list of integers"),
    "ids as numbers with a point": ("t.jsonl", lines({"input_ids": [1.0, 2]}), TOKENS, r"no list of integers"),
    "ids as truth": ("t.jsonl", lines({"input_ids": [True, 2]}), TOKENS, r"no list of integers"),
    "id beyond the vocabulary": ("t.jsonl", lines({"input_ids": [1, 400]}), TOKENS, r"token 400 .* tokenizer has 400"),
    "negative id": ("t.jsonl", lines({"input_ids": [1, -1]}), TOKENS, r"token -1 in field 'input_ids'"),
    "labels of another length": (
        "t.jsonl", lines({"input_ids": [1, 2], "labels": [1]}), TOKENS, r"1 labels for 2 input_ids"),
    "labels that are shifted": (
        "t.jsonl", lines({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}), TOKENS, r"label 0 is 2, neither its"),
    # preference pairs
    "no rejected": ("t.jsonl", lines({"prompt": "x", "chosen": "y"}), PAIRS, r"no field 'rejected' .*chosen"),
    "null chosen": ("t.jsonl", lines({"prompt": "x", "chosen": None, "rejected": "y"}), PAIRS, r"'chosen' is null"),
    "pair without prompt": ("t.jsonl", lines({"chosen": "x", "rejected": "y"}), PAIRS, r"'assistant' cannot come fi"),
    "pair of two prompts": (
        "t.jsonl", lines({"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "z"}, ANSWER]}), PAIRS,
        r"chosen and rejected answer different prompts"),
    "pair that ends in a question": (
        "t.jsonl", lines({"prompt": [USER], "chosen": [ANSWER, USER], "rejected": [ANSWER, USER]}), PAIRS,
        r"chosen: the last message is not the assistant's"),
    "pair whose answer has weight 0": (
        "t.jsonl", lines({"prompt": [USER], "chosen": ANSWER, "rejected": {**ANSWER, "weight": 0}}), PAIRS,
        r"rejected: the answer has weight 0"),
    # archives
    "member above the archive": ("t.tar", tar(("../x.txt", b"x")), {}, r"member '../x.txt': its path leads out"),
    "member above it later": ("t.tar", tar(("a.txt", b"x"), ("b/../../x.txt", b"x")), {}, r"its path leads out"),
    "absolute member": ("t.tar", tar(("/etc/x.txt", b"x")), {}, r"member '/etc/x.txt': its path leads out"),
    "member with a backslash": ("t.tar", tar(("..\\x.txt", b"x")), {}, r"its path leads out"),
    "symbolic link": (
        "t.tar", tar(("x.txt", b""), type=tarfile.SYMTYPE, linkname="/etc/passwd"), {}, r"'x.txt': not a plain file"),
    "hard link": ("t.tar", tar(("x.txt", b""), type=tarfile.LNKTYPE, linkname="/etc/passwd"), {}, r"not a plain file"),
    "device": ("t.tar", tar(("x.txt", b""), type=tarfile.CHRTYPE), {}, r"not a plain file"),
    "no archive": ("t.tar", b"<html>not found</html>" * 40, {}, r"t\.tar: no tar archive"),
    "archive cut in a member": ("t.tar", tar(("x.txt", b"x" * 2000))[:1500], {}, r"cut short|no tar archive"),
    "member twice": ("t.tar", tar(("x.txt", b"a"), ("x.txt", b"b")), {}, r"two members of this extension"),
    "member that is no UTF-8": ("t.tar", tar(("x.txt", b"\xff")), {}, r"record 'x', member .txt: byte 0 is not UTF-8"),
    "member that is no JSON": ("t.tar", tar(("x.json", b"{")), {}, r"record 'x', member .json: not JSON"),
    "member that is no object": ("t.tar", tar(("x.json", b"[1]")), {}, r"member .json: a list, not an object"),
    "archive without text": ("t.tar", tar(("x.cls", b"1")), {}, r"record 'x': no field 'text' .fields: __key__, cls"),
    "empty archive": ("t.tar", tar(), {}, r"no document"),
    # compressed
    "gzip cut short": ("t.jsonl.gz", gzip.compress(lines(*[{"text": str(n)} for n in range(999)]))[:-40], {},
                       r"t\.jsonl\.gz: cannot be read"),
    "no gzip": ("t.jsonl.gz", b"{}", {}, r"t\.jsonl\.gz: cannot be read"),
    "malformed line in gzip": ("t.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"te'), {}, r"\.gz, line 2: not JSON"),
    # what streams name otherwise
    "malformed line": ("t.jsonl", b'{"text": "a"}\n{"te\n', {}, r"t\.jsonl, (line 2|byte 14): not JSON"),
    "line that is no object": ("t.jsonl", b'{"text": "a"}\n[1]\n', {}, r"(line 2|byte 14): a list, not an object"),
    "null text": ("t.jsonl", lines({"text": "a"}, {"text": None}), {}, r"(line 2|byte 14): field 'text' is null"),
    "damaged parquet": ("t.parquet", b"PAR1 no PAR1", {}, r"t\.parquet: cannot be read"),
    "damaged arrow": ("t.arrow", b"ARROW1 no", {}, r"t\.arrow: cannot be read"),
    "only blank lines": ("t.jsonl", b"\n \n", {}, r"no document"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_bad_data_is_named(case, streaming, tokenizer, tmp_path):
    name, content, options, message = CASES[case]
    path, canary = tmp_path / name, tmp_path.parent / "x.txt"
    path.write_bytes(content)

    def use():
        dataset = dataset_of(str(path), streaming=streaming, cache_dir=tmp_path / "cache", **options)
        list(make_loader(dataset, tokenizer, epochs=1, cache_dir=tmp_path / "cache", stream_shards=1))

    with pytest.raises(DataError, match=message) as raised:
        use()
    assert raised.value.fix
    assert not canary.exists()


ONE = lines({"text": "a"})

MIXTURES = {
    "weights that sum to zero": ({"sources": [("a", 0), ("b", 0)]}, ConfigError, r"weights of the sources sum to zero"),
    "a negative weight": ({"sources": [("a", 1), ("b", -1)]}, ConfigError, r"'b' has weight -1"),
    "a weight that is no number": ({"sources": [("a", float("nan"))]}, ConfigError, r"'a' has weight nan"),
    "two of one name": ({"sources": [("a", 1), ("a", 1)]}, ConfigError, r"two sources are called 'a'"),
    "no source": ({"sources": []}, ConfigError, r"name a source"),
    "unknown weights": ({"sources": [("a", 1)], "sampling": "tokens"}, ConfigError, r"did you mean 'token'"),
    "unknown stopping": (
        {"sources": [("a", 1)], "stopping_strategy": "first"}, ConfigError, r"stopping_strategy: 'first'"),
    "unknown format": ({"sources": [("a", 1)], "format": "sharegtp"}, ConfigError, r"did you mean 'sharegpt'"),
    "missing source": ({"sources": [("gone", 1)]}, DataError, r"gone\.jsonl does not exist"),
    "epochs of what repeats": ({"sources": [("a", 1), ("b", 1)], "epochs": 2}, ConfigError, r"has no epochs"),
    "media among text": (
        {"sources": [("a", 1), ("b", 1)], "of_b": {"data_type": "multimodal"}}, ConfigError,
        r"need a model's processor"),
    "split pairs": (
        {"sources": [("pairs", 1)], "on_overflow": "split", **PAIRS}, ConfigError, r"cut preference records apart"),
    "unknown policy": ({"sources": [("a", 1)], "on_overflow": "cut"}, ConfigError, r"no policy is called 'cut'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXTURES)
def test_bad_mixtures_are_named(case, tokenizer, tmp_path):
    options, kind, message = MIXTURES[case]
    options = dict(options)
    (tmp_path / "a.jsonl").write_bytes(ONE)
    (tmp_path / "b.jsonl").write_bytes(lines({"messages": [USER, ANSWER]}) if "of_b" in options else ONE)
    (tmp_path / "pairs.jsonl").write_bytes(lines({"prompt": "x", "chosen": "y", "rejected": "z"}))
    own = {key: options.pop(key) for key in ("epochs", "on_overflow") if key in options}
    of_b, shared = options.pop("of_b", {}), {key: options[key] for key in ("data_type", "format") if key in options}

    def use():
        given = options.pop("sources")
        sources = [
            DataSource(
                str(tmp_path / f"{name}.jsonl"), name, weight, RecordSchema(**shared | (of_b if name == "b" else {}))
            )
            for name, weight in given
        ]
        keys = ("sampling", "stopping_strategy")
        dataset = build_mixture(sources, **{key: options[key] for key in keys if key in options})
        make_loader(dataset, tokenizer, cache_dir=tmp_path / "cache", stream_shards=1, **own)

    with pytest.raises(kind, match=message) as raised:
        use()
    assert raised.value.fix


URLS = {
    "nothing there": ("memory://nowhere/t.jsonl", r"nowhere/t\.jsonl does not exist"),
    "an empty pattern": ("memory://nowhere/*.jsonl", r"no file there"),
    "an unknown scheme": ("xyz://host/t.jsonl", r"xyz://host/t\.jsonl: cannot be read: .*Protocol"),
    "a package that is missing": ("s3://key:secret@bucket/t.jsonl", r"s3://bucket/t\.jsonl: .*s3fs"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", URLS)
def test_bad_urls_are_named_without_their_secrets(case, streaming, tmp_path):
    url, message = URLS[case]
    with pytest.raises(DataError, match=message) as raised:
        dataset_of(url, streaming=streaming, cache_dir=tmp_path)
    assert "secret" not in str(raised.value)


def test_a_column_of_the_wrong_type_in_parquet(tokenizer, tmp_path):
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"input_ids": [[1, 2], [3, 999]]}), tmp_path / "t.parquet")
    dataset = dataset_of(str(tmp_path / "t.parquet"), data_type="pretokenized", streaming=True)
    with pytest.raises(DataError, match=r"t\.parquet, record 2: token 999"):
        list(make_loader(dataset, tokenizer, epochs=1, stream_shards=1, cache_dir=tmp_path, shuffle=False))
