from __future__ import annotations

import json
import os
import pickle
import signal
import time

import pytest

from tests.data.conftest import DOCUMENTS, sentence
from tests.data.loaders import dataset_of
from veomni.data.sources.cache import build_once
from veomni.data.text.token_cache import tokenize
from veomni.testing.ranks import run_ranks


def entries(cache):
    return [path for path in cache.iterdir() if path.is_dir()]


def expected(tokenizer):
    return [[*tokenizer(sentence(n))["input_ids"], tokenizer.eos_token_id] for n in range(DOCUMENTS)]


def content(documents):
    return [documents.part(index, 0, length).ids.tolist() for index, length in enumerate(documents.lengths)]


def test_documents_are_what_the_tokenizer_gives(corpus, tokenizer, tmp_path):
    documents, _ = tokenize(dataset_of(str(corpus)), tokenizer, tmp_path)
    assert content(documents) == expected(tokenizer)
    assert documents.part(3, 2, 2).ids.tolist() == expected(tokenizer)[3][2:4]
    copied = pickle.dumps(documents)
    assert len(copied) < 1000, "workers map the files themselves"
    assert content(pickle.loads(copied)) == expected(tokenizer)


def test_ranks_that_come_at_once_tokenise_once(corpus, tokenizer, tmp_path):
    calls = tmp_path / "calls"

    def rank():
        encode = type(tokenizer).__call__

        def counted(self, *args, **kwargs):
            with calls.open("a") as file:
                file.write("x")
            return encode(self, *args, **kwargs)

        type(tokenizer).__call__ = counted
        documents, _ = tokenize(dataset_of(str(corpus)), tokenizer, tmp_path / "cache")
        return content(documents)

    assert run_ranks(rank, 4, init=False) == [expected(tokenizer)] * 4
    assert calls.read_text() == "x"
    assert len(entries(tmp_path / "cache")) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "no checksum", "bad checksum", "lost file"])
def test_a_damaged_entry_is_built_again(damage, corpus, tokenizer, tmp_path, caplog):
    dataset = dataset_of(str(corpus))
    tokenize(dataset, tokenizer, tmp_path)
    [entry] = entries(tmp_path)
    tokens, checksum = entry / "tokens.arrow", entry / "checksum"
    data = tokens.read_bytes()
    match damage:
        case "flip":
            tokens.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
        case "truncate":
            tokens.write_bytes(data[:-2])
        case "no checksum":
            checksum.unlink()
        case "bad checksum":
            checksum.write_text("{")
        case "lost file":
            tokens.unlink()
    documents, _ = tokenize(dataset, tokenizer, tmp_path)
    assert content(documents) == expected(tokenizer)
    assert caplog.text.count("is damaged") == 1


def test_what_is_found_is_not_built_again(corpus, tokenizer, tmp_path, caplog):
    dataset = dataset_of(str(corpus))
    tokenize(dataset, tokenizer, tmp_path)
    caplog.clear()
    tokenize(dataset_of(str(corpus)), tokenizer, tmp_path)
    assert "tokenised" not in caplog.text
    tokenizer(
        [sentence(0), sentence(1)], padding=True, truncation=True, max_length=4
    )  # leaves its mark on the tokenizer
    assert content(tokenize(dataset, tokenizer, tmp_path)[0]) == expected(tokenizer)
    assert len(entries(tmp_path)) == 1


def test_entries_follow_content_choice_and_tokenizer(corpus, tokenizer, tmp_path):
    from veomni.data import train_byte_bpe

    changed = tmp_path / "changed.jsonl"
    changed.write_text(corpus.read_text().replace("0: ", "0; ", 1))
    same = tmp_path / "renamed.jsonl"
    same.write_text(corpus.read_text())
    cache = tmp_path / "cache"
    digests = [
        tokenize(dataset_of(str(path), max_documents=first), a_tokenizer, cache)[1]
        for path, first, a_tokenizer in (
            (corpus, None, tokenizer),
            (same, None, tokenizer),
            (changed, None, tokenizer),
            (corpus, 50, tokenizer),
            (corpus, None, train_byte_bpe(["other"], 270)),
        )
    ]
    assert digests[0] == digests[1]
    assert len({json.dumps(digest) for digest in digests}) == 4
    assert len(entries(cache)) == 4


def test_a_builder_that_dies_leaves_nothing_under_the_name(tmp_path):
    """The lock of a killed process is released by the system, and the next one builds."""
    started, target = tmp_path / "started", tmp_path / "cache" / "entry"

    def slow(directory):
        (directory / "part").write_text("half")
        started.touch()
        time.sleep(60)

    pid = os.fork()
    if not pid:
        build_once(target, slow, lambda path: None)
        os._exit(0)
    deadline = time.monotonic() + 10
    while not started.exists():
        assert time.monotonic() < deadline
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not target.exists()
    build_once(target, lambda directory: (directory / "whole").touch(), lambda path: None)
    assert [path.name for path in target.iterdir()] == ["whole"]
