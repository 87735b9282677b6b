from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from tests.data.loaders import dataset_of, make_loader
from veomni.data import train_byte_bpe
from veomni.data.text.byte_bpe import SPECIAL_TOKENS, _thinned
from veomni.errors import ConfigError, DataError

TEXTS = [f"def function_{n}(argument):\n    return argument + {n}\n" for n in range(200)]
HARD = ["naïve ☃ 日本語 \x00\x7f", "  tabs\tand\r\nnewlines \n\n", "", "e\u0301 vs é", "\U0001f600"]


def test_any_text_round_trips_also_after_saving(tmp_path):
    tokenizer = train_byte_bpe(TEXTS, 400)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS[:3], *HARD]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == loaded.decode(ids) == text
        assert loaded(text)["input_ids"] == ids
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert len(loaded) == 400


def test_special_tokens_are_one_token_each():
    tokenizer = train_byte_bpe(TEXTS, 300)
    assert [tokenizer(token)["input_ids"] for token in SPECIAL_TOKENS] == [[n] for n in range(len(SPECIAL_TOKENS))]


def test_training_is_reproducible():
    first, second = (train_byte_bpe(iter(TEXTS), 350) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_a_vocabulary_without_room_is_rejected():
    with pytest.raises(ConfigError, match="at least 269"):
        train_byte_bpe(TEXTS, 268)


@pytest.mark.parametrize(("limit", "stride"), [(10_000, 1), (999, 2), (300, 4), (1, 128)])
def test_much_text_is_thinned_evenly(limit, stride):
    texts = [f"{n:010d}" for n in range(100)]
    kept = _thinned(texts, limit)
    assert kept == texts[::stride]
    assert sum(map(len, kept)) <= max(limit, 10)


def test_a_tokenizer_without_an_end_is_rejected(tmp_path):
    tokenizer = train_byte_bpe(["some text"], 269)
    tokenizer.eos_token = None
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(DataError, match="no eos_token"):
        make_loader(dataset_of(str(tmp_path / "t.txt")), tokenizer, cache_dir=tmp_path / "cache")
